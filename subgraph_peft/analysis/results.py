"""What an analysis says: spectra, the overlap of an update with its base, the similarity of two updates."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..base.errors import AnalysisError, nearest
from ..base.text import Table

SHARE = 0.9  # of an update's energy, whose directions are counted


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

    def __str__(self) -> str:
        return "\n\n".join([*map(str, tables(self)), *findings(self)])


Row = tuple[str, ...]
UPDATE_COLUMNS = (
    "module", ">shape", ">‖ΔW‖ / ‖W‖", ">rank", ">stable rank", f">directions for {SHARE:.0%}", ">stable rank of W",
)  # fmt: skip
AMPLIFICATION_COLUMNS = (
    "module", ">r", ">‖ΔW‖", ">‖UᵀWV‖ of ΔW", ">of W", ">of random", ">amplification",
)  # fmt: skip
OVERLAP_COLUMNS = (
    "module", ">k", ">W's energy in k", ">inside", ">output only", ">input only", ">outside", ">inside by chance",
)  # fmt: skip
SIMILARITY_COLUMNS = ("module", ">r₁", ">r₂", ">φ right", ">by chance", ">φ left", ">by chance")


def module(site: SiteAnalysis) -> str:
    return site.name.removesuffix(".weight")


def count(spectrum: Spectrum) -> str:
    """The numerical rank, or what is known of it."""
    return f"{spectrum.rank}" if spectrum.exact or spectrum.rank < len(spectrum.values) else f"≥ {spectrum.rank}"


def needed(spectrum: Spectrum) -> str:
    directions = spectrum.directions(SHARE)
    return f"> {len(spectrum.values)}" if directions is None else f"{directions}"


def update_rows(analysis: Analysis) -> Iterator[Row]:
    for site in analysis.sites:
        size, relative = "×".join(map(str, site.shape)), f"{site.relative:.3%}"
        own = ("0", "", "") if not site.moved else (
            count(site.update), f"{site.update.stable_rank:.2f}", needed(site.update)
        )  # fmt: skip
        yield module(site), size, relative, *own, f"{site.base.stable_rank:.2f}"


def amplification_rows(analysis: Analysis) -> Iterator[Row]:
    for site in analysis.sites:
        if (found := site.overlap) is not None:
            projected = (found.projected_update, found.projected_base, found.projected_random)
            numbers = (f"{value:.3g}" for value in (found.norm, *projected, found.amplification))
            yield module(site), str(found.r), *numbers


def overlap_rows(analysis: Analysis) -> Iterator[Row]:
    for site in analysis.sites:
        if (found := site.overlap) is not None:
            blocks = (found.inside, found.left - found.inside, found.right - found.inside, found.outside, found.chance)
            shares = (f"{max(0.0, share):.2%}" for share in (site.base.energy(found.k), *blocks))
            yield module(site), str(found.k), *shares


def similarity_rows(analysis: Analysis) -> Iterator[Row]:
    for site in analysis.sites:
        if (found := site.similarity) is not None:
            (right, left), (right_chance, left_chance) = found.whole, found.chance
            numbers = (f"{value:.3f}" for value in (right, right_chance, left, left_chance))
            yield module(site), *map(str, found.right.shape), *numbers


def tables(analysis: Analysis) -> list[Table]:
    """Those that have rows."""
    updates = f"Updates of {analysis.source} by {' over '.join(reversed(analysis.adapters))}"
    amplification = "Amplification, along r directions"
    overlap = "Share of the updates in the base's k largest directions"
    similarity = f"Similarity with {' over '.join(reversed(analysis.other))}"
    made = (
        Table(updates, UPDATE_COLUMNS, list(update_rows(analysis))),
        Table(amplification, AMPLIFICATION_COLUMNS, list(amplification_rows(analysis))),
        Table(overlap, OVERLAP_COLUMNS, list(overlap_rows(analysis))),
        Table(similarity, SIMILARITY_COLUMNS, list(similarity_rows(analysis))),
    )
    return [table for table in made if table.rows]


def findings(analysis: Analysis) -> list[str]:
    """What the tables say, in sentences."""
    moved = [site for site in analysis.sites if site.moved]
    still = [site for site in analysis.sites if not site.moved]
    said = []
    if moved:
        most, least = max(moved, key=size_of), min(moved, key=size_of)
        said.append(
            f"Moved most: {module(most)} (‖ΔW‖ / ‖W‖ = {most.relative:.3%}); least: {module(least)} "
            f"({least.relative:.3%})."
        )
        widest = max(moved, key=lambda s: s.update.directions(SHARE) or math.inf)
        said.append(
            f"The median update has rank {median(s.update.rank for s in moved):g} and stable rank "
            f"{median(s.update.stable_rank for s in moved):.2f}. {SHARE:.0%} of its energy lies in "
            f"{median(s.update.directions(SHARE) or math.inf for s in moved):g} directions, at most in "
            f"{needed(widest.update)} ({module(widest)})."
        )
        said.append(
            f"{typical(moved, lambda o: o.inside):.2%} of the median update lies inside the base's largest directions, "
            f"where an update of random numbers has {typical(moved, lambda o: o.chance):.2%}, and "
            f"{typical(moved, lambda o: o.outside):.2%} outside; the median amplification is "
            f"{typical(moved, lambda o: o.amplification):.3g}."
        )
    if alike := [site.similarity for site in moved if site.similarity is not None]:
        said.append(
            f"Median similarity with the other update: right φ = {median(s.whole[0] for s in alike):.3f} (by chance "
            f"{median(s.chance[0] for s in alike):.3f}), left φ = {median(s.whole[1] for s in alike):.3f} (by chance "
            f"{median(s.chance[1] for s in alike):.3f})."
        )
    if still:
        said.append(f"Not moved: {', '.join(map(module, still))}.")
    if rough := [site for site in analysis.sites if not site.base.exact]:
        said.append(
            f"{len(rough)} sites are large: of their singular values only the {len(rough[0].base.values)} largest were "
            f"computed, approximately. They hold {least_energy(site.base for site in rough):.1%} of the energy of W at "
            f"least, and {least_energy(site.update for site in rough):.1%} of that of ΔW."
        )
    if analysis.left_out:
        said.append("Left out: " + ", ".join(f"{name} ({why})" for name, why in analysis.left_out) + ".")
    return said


def least_energy(spectra: Iterable[Spectrum]) -> float:
    return min((spectrum.energy(len(spectrum.values)) for spectrum in spectra if spectrum.norm), default=1.0)


def size_of(site: SiteAnalysis) -> float:
    return site.relative


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def typical(sites: Iterable[SiteAnalysis], of: Callable) -> float:
    return median(of(site.overlap) for site in sites)
