"""An analysis as a folder: its numbers as JSON, its tables and sentences as a page, and pictures."""

import math
import os
from pathlib import Path
from typing import Any

from ..base.errors import AnalysisError
from ..base.files import write_json, write_text
from .pictures import draw_agreement, draw_shares, draw_similarity, draw_spectra
from .results import SHARE, Analysis, SiteAnalysis, Spectrum, findings, module, size_of, tables


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


def write_analysis(analysis: Analysis, folder: str | os.PathLike, site: str | None = None) -> Path:
    """Write analysis.json, analysis.md, spectra.png, shares.png, and with another update similarity.png and
    agreement.png to `folder`; returns the path of analysis.md.

    site: whose φ(i, j) is drawn; by default the one whose update is largest against its weight. Raises AnalysisError.
    """
    folder = Path(folder)
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
    for table in tables(analysis):
        lines += [f"## {table.title}", "", *table.markdown()]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", ""]
    return "\n".join(lines)
