"""What an analysis says: spectra, the overlap of an update with its base, the similarity of two updates."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import AnalysisError, nearest


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ₁ ≥ σ₂ ≥ … of a matrix M [out, in].

    values: all min(out, in) of them if `exact`, else the largest, by randomised subspace iteration
    norm:   ‖M‖_F, never approximated          rank: how many σᵢ exceed max(out, in) · eps · σ₁ (numerical rank)
    """

    values: tuple[float, ...]
    norm: float
    rank: int
    exact: bool

    @property
    def stable_rank(self) -> float:
        """‖M‖_F² / ‖M‖₂², between 1 and the rank; 0 for M = 0."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] else 0.0

    def energy(self, r: int) -> float:
        """Σ_{i≤r} σᵢ² / ‖M‖_F²; 0 for M = 0."""
        return sum(value**2 for value in self.values[:r]) / self.norm**2 if self.norm else 0.0

    def directions(self, share: float = 0.9) -> int | None:
        """The least r with energy(r) ≥ share; None where `values` hold less than that."""
        total = 0.0
        for count, value in enumerate(self.values, start=1):
            total += value**2
            if total >= share * self.norm**2:
                return count
        return None


@dataclass(frozen=True)
class Overlap:
    """ΔW against W, along r directions of the update and k of the base.

    U [out, r], V [in, r] are the r largest singular directions of ΔW, of W, or of a matrix of random numbers:
    projected_update, projected_base, projected_random = ‖Uᵀ W V‖_F for each (Hu et al. 2021, "LoRA", Table 7).
    P_U, P_V project on the k largest singular directions of W:
    inside = ‖P_U ΔW P_V‖² / ‖ΔW‖²,  left = ‖P_U ΔW‖² / ‖ΔW‖²,  right = ‖ΔW P_V‖² / ‖ΔW‖²;
    chance is what `inside` is on average for an update of random numbers, k² / (out · in).
    """

    r: int
    k: int
    norm: float
    projected_update: float
    projected_base: float
    projected_random: float
    inside: float
    left: float
    right: float
    chance: float

    @property
    def outside(self) -> float:
        """‖(1 − P_U) ΔW (1 − P_V)‖² / ‖ΔW‖²: neither reads nor writes the base's largest directions."""
        return max(0.0, 1 - self.left - self.right + self.inside)

    @property
    def amplification(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F, U and V of ΔW: how much the update strengthens what W already does along it."""
        return self.norm / self.projected_update if self.projected_update else math.inf


@dataclass(frozen=True, eq=False)
class Similarity:
    """φ(i, j) = ‖U₁ⁱᵀ U₂ʲ‖_F² / min(i, j) in [0, 1] of two updates: 0 for orthogonal subspaces, 1 where one holds
    the other. Uⁱ are the i largest singular directions; element [i − 1, j − 1] of

    right [r₁, r₂]: right-singular directions, in the input space (for a low-rank update, the row space of A)
    left  [r₁, r₂]: left-singular directions, in the output space (the column space of B)
    shape: (out, in)

    Source: Hu et al. 2021, "LoRA", Eq. 4, there of the factors A.
    """

    right: torch.Tensor
    left: torch.Tensor
    shape: tuple[int, int]

    @property
    def whole(self) -> tuple[float, float]:
        """φ(r₁, r₂), right and left: all directions of one update against all of the other."""
        return self.right[-1, -1].item(), self.left[-1, -1].item()

    @property
    def chance(self) -> tuple[float, float]:
        """What φ(r₁, r₂) is on average for random subspaces: max(r₁, r₂) / in, and / out."""
        size = max(self.right.shape)
        return size / self.shape[1], size / self.shape[0]


@dataclass(frozen=True)
class SiteAnalysis:
    """One weight [out, in]. An update of no more than rounding, ‖ΔW‖ ≤ eps ‖W‖, has rank 0 and no overlap; there is no
    similarity without another update."""

    name: str
    shape: tuple[int, int]
    base: Spectrum
    update: Spectrum
    overlap: Overlap | None
    similarity: Similarity | None = None

    @property
    def relative(self) -> float:
        """‖ΔW‖_F / ‖W‖_F"""
        return self.update.norm / self.base.norm if self.base.norm else math.inf if self.update.norm else 0.0

    @property
    def moved(self) -> bool:
        return self.overlap is not None


@dataclass(frozen=True)
class Analysis:
    """What the adapters of a program did to its weights; prints as tables.

    other:    the adapters that the sites' similarities compare with
    left_out: (name, reason) of what the adapters change that is no weight, and of sites that only one program has
    """

    source: str
    adapters: tuple[str, ...]
    sites: tuple[SiteAnalysis, ...]
    other: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def site(self, name: str) -> SiteAnalysis:
        """By the path of the weight or of its module."""
        for site in self.sites:
            if name in (site.name, site.name.rpartition(".")[0]):
                return site
        close = ", ".join(nearest(name, [site.name for site in self.sites]))
        raise AnalysisError(f"The analysis has no site {name!r}. Nearest: {close}.")

    def save(self, folder: str | os.PathLike, site: str | None = None) -> Path:
        """Write analysis.json, analysis.md and its pictures to `folder`; returns the path of analysis.md.

        site: whose φ(i, j) is drawn; by default the one whose update is largest against its weight
        """
        from .analysis_report import write

        return write(self, Path(folder), site)

    def __str__(self) -> str:
        from .analysis_report import findings, tables
        from .tables import render

        return "\n\n".join([*map(render, tables(self)), *findings(self)])
