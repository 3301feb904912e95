"""An analysis for people and programs: tables, what they say in sentences, and a folder with pictures."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import report
from .analysis import Analysis, SiteAnalysis, Spectrum
from .analysis_pictures import draw_agreement, draw_shares, draw_similarity, draw_spectra
from .errors import AnalysisError
from .files import write_json, write_text
from .tables import fill, new_table

SHARE = 0.9

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


def sections(analysis: Analysis) -> list[tuple[str, tuple[str, ...], list[Row]]]:
    """(title, columns, rows) of the tables that have rows."""
    over = " over ".join(reversed(analysis.adapters))
    found = [
        (f"Updates of {analysis.source} by {over}", UPDATE_COLUMNS, list(update_rows(analysis))),
        ("Amplification, along r directions", AMPLIFICATION_COLUMNS, list(amplification_rows(analysis))),
        ("Share of the updates in the base's k largest directions", OVERLAP_COLUMNS, list(overlap_rows(analysis))),
        (
            f"Similarity with {' over '.join(reversed(analysis.other))}",
            SIMILARITY_COLUMNS,
            list(similarity_rows(analysis)),
        ),
    ]
    return [entry for entry in found if entry[2]]


def tables(analysis: Analysis) -> Iterator[Table]:
    for title, columns, rows in sections(analysis):
        table = new_table(title, columns)
        fill(table, rows)
        yield table


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


def document(analysis: Analysis) -> dict[str, Any]:
    """Plain data. What is infinite or undefined is null: an amplification over nothing, the overlap of no update."""
    return {
        "source": analysis.source,
        "adapters": list(analysis.adapters),
        "other": list(analysis.other),
        "left_out": [list(entry) for entry in analysis.left_out],
        "findings": findings(analysis),
        "sites": [site_document(site) for site in analysis.sites],
    }


def site_document(site: SiteAnalysis) -> dict[str, Any]:
    overlap, similarity = site.overlap, site.similarity
    return {
        "name": site.name,
        "shape": list(site.shape),
        "relative": finite(site.relative),
        "base": spectrum_document(site.base),
        "update": spectrum_document(site.update),
        "overlap": overlap and {
            **vars(overlap), "outside": overlap.outside, "amplification": finite(overlap.amplification)
        },
        "similarity": similarity and {"right": similarity.right.tolist(), "left": similarity.left.tolist()},
    }  # fmt: skip


def spectrum_document(spectrum: Spectrum) -> dict[str, Any]:
    derived = {"stable_rank": spectrum.stable_rank, f"directions_{SHARE:.0%}": spectrum.directions(SHARE)}
    return {**vars(spectrum), **derived}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(analysis: Analysis, folder: Path, site: str | None = None) -> Path:
    """analysis.json, analysis.md, spectra.png, shares.png, and with another update similarity.png and agreement.png."""
    alike = [entry for entry in analysis.sites if entry.similarity is not None]
    if site is not None and analysis.site(site) not in alike:
        raise AnalysisError(f"{site} has no similarity to draw; analyze with another program that moved it too.")
    pictures = {"spectra.png": "singular values of base and update"}
    draw_spectra(folder / "spectra.png", analysis.sites)
    if any(entry.moved for entry in analysis.sites):
        draw_shares(folder / "shares.png", analysis.sites)
        pictures["shares.png"] = "size of the updates, and where they lie in the base"
    if alike:
        shown = analysis.site(site) if site is not None else max(alike, key=size_of)
        draw_similarity(folder / "similarity.png", shown)
        draw_agreement(folder / "agreement.png", alike)
        pictures["similarity.png"] = f"φ(i, j) at {module(shown)}"
        pictures["agreement.png"] = "φ(r₁, r₂) at every site"
    write_json(folder / "analysis.json", document(analysis), AnalysisError)
    write_text(folder / "analysis.md", page(analysis, pictures), AnalysisError)
    return folder / "analysis.md"


def page(analysis: Analysis, pictures: dict[str, str]) -> str:
    lines = [
        f"# Inside the updates of {analysis.source}",
        "",
        *(f"- {sentence}" for sentence in findings(analysis)),
        "",
    ]
    for title, columns, rows in sections(analysis):
        lines += [f"## {title}", "", *report.table([column.removeprefix(">") for column in columns], rows)]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", ""]
    return "\n".join(lines)
