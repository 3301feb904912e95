"""Pictures of an analysis: spectra with the layers overlaid, maps over layers and kinds of module, φ(i, j)."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..base.errors import AnalysisError
from ..base.files import replacing
from ..base.text import layered
from .results import SiteAnalysis, Spectrum

Layer = tuple[int, ...]


def layer_of(name: str) -> Layer:
    """The numbers in a weight's path; empty for one that stands alone."""
    return tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name)))


def kinds_of(sites: Sequence[SiteAnalysis]) -> dict[str, list[SiteAnalysis]]:
    """Sites by what they share in all layers, under the shortest labels that tell them apart."""
    kinds: dict[str, list[SiteAnalysis]] = {}
    for site in sites:
        kinds.setdefault(layered(site.name), []).append(site)
    short = {kind: kind.rpartition("*.")[2] for kind in kinds}
    return {short[kind] if len(set(short.values())) == len(kinds) else kind: kinds[kind] for kind in kinds}


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def write_picture(figure: Figure, path: str | os.PathLike) -> None:
    with replacing(path, AnalysisError) as temporary:
        figure.savefig(temporary, format="png")


def draw_spectra(path: str | os.PathLike, sites: Sequence[SiteAnalysis]) -> None:
    """One row a kind of module, the base's spectrum beside the update's, one line a layer."""
    kinds = kinds_of(sites)
    figure = canvas(9, 0.4 + 2.2 * len(kinds))
    panes = figure.subplots(len(kinds), 2, squeeze=False)
    for (base, change), (kind, members) in zip(panes, kinds.items(), strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(members)))
        for site, colour in zip(sorted(members, key=lambda s: layer_of(s.name)), colours, strict=True):
            label = ".".join(map(str, layer_of(site.name)))
            plot(base, site.base, colour, label)
            plot(change, site.update, colour, label)
        base.set(title=f"{kind}: W", ylabel="singular value")
        change.set(title=f"{kind}: ΔW")
        if 1 < len(members) <= 12:
            base.legend(title="layer", fontsize="x-small", title_fontsize="x-small", ncols=2)
    for pane in panes.flat:
        pane.grid(alpha=0.3)
        pane.xaxis.set_major_locator(MaxNLocator(integer=True))
    for pane in panes[-1]:
        pane.set_xlabel("i")
    write_picture(figure, path)


def plot(pane: Any, spectrum: Spectrum, colour: Any, label: str) -> None:
    """The singular values up to the numerical rank."""
    values = spectrum.values[: spectrum.rank]
    if values:
        pane.semilogy(range(1, len(values) + 1), values, ".-" if len(values) <= 32 else "-", color=colour, label=label)


def draw_shares(path: str | os.PathLike, sites: Sequence[SiteAnalysis]) -> None:
    """How far each site moved, in how many directions, and how much of it lies inside and outside the base's largest
    directions: layers from left to right, kinds of module from top to bottom."""
    moved = [site for site in sites if site.moved]
    maps: dict[str, Callable[[SiteAnalysis], float]] = {
        "‖ΔW‖ / ‖W‖": lambda site: site.relative,
        "stable rank of ΔW": lambda site: site.update.stable_rank,
        "share of ΔW inside the base's largest directions": lambda site: site.overlap.inside,
        "share of ΔW outside them": lambda site: site.overlap.outside,
    }
    draw_maps(path, moved, maps)


def draw_agreement(path: str | os.PathLike, sites: Sequence[SiteAnalysis]) -> None:
    """φ(r₁, r₂) at every site."""
    maps: dict[str, Callable[[SiteAnalysis], float]] = {
        "φ of right directions (input)": lambda site: site.similarity.whole[0],
        "φ of left directions (output)": lambda site: site.similarity.whole[1],
    }
    draw_maps(path, sites, maps, highest=1.0)


def draw_maps(
    path: str | os.PathLike,
    sites: Sequence[SiteAnalysis],
    maps: Mapping[str, Callable[[SiteAnalysis], float]],
    highest: float | None = None,
) -> None:
    """A heat map of every quantity, two in a row; white where a kind of module has no such layer."""
    kinds = kinds_of(sites)
    layers = sorted({layer_of(site.name) for site in sites})
    width, height = 2.6 + 0.3 * len(layers), 1.0 + 0.3 * len(kinds)
    rows = (len(maps) + 1) // 2
    figure = canvas(2 * max(width, 4.6), rows * max(height, 1.6))
    for pane, (title, value) in zip(figure.subplots(rows, 2, squeeze=False).flat, maps.items(), strict=True):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for row, members in enumerate(kinds.values()):
            for site in members:
                grid[row, layers.index(layer_of(site.name))] = value(site)
        image = pane.imshow(np.ma.masked_invalid(grid), aspect="auto", vmin=0, vmax=highest)
        pane.set_title(title, fontsize="medium")
        pane.set_yticks(range(len(kinds)), list(kinds))
        pane.set_xticks(range(len(layers)), [".".join(map(str, layer)) for layer in layers], fontsize="small")
        pane.set_xlabel("layer")
        figure.colorbar(image, ax=pane)
    write_picture(figure, path)


def draw_similarity(path: str | os.PathLike, site: SiteAnalysis) -> None:
    """φ(i, j) of one site: i directions of this update, j of the other."""
    figure = canvas(9.5, 4.2)
    panes = figure.subplots(1, 2)
    for pane, (side, matrix) in zip(
        panes, {"right (input)": site.similarity.right, "left (output)": site.similarity.left}.items(), strict=True
    ):
        rows, columns = matrix.shape
        extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
        image = pane.imshow(matrix.numpy(), aspect="auto", vmin=0, vmax=1, extent=extent)
        pane.set(title=f"φ(i, j) of {side} directions", xlabel="j, other update", ylabel="i, this update")
        pane.xaxis.set_major_locator(MaxNLocator(integer=True))
        pane.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(site.name.removesuffix(".weight"))
    figure.colorbar(image, ax=panes)
    write_picture(figure, path)
