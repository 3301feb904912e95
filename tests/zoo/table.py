"""The zoo as a table: a "yes" or the number of a reason in every cell, the reasons below."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from subgraph_peft.base.text import Table
from tests.zoo.entry import STAGES, Entry
from tests.zoo.road import NOT_REACHED, YES, Row

SHORT = {NOT_REACHED: "-", YES: YES}


def text(rows: Iterable[Row], entries: Mapping[str, Entry], notes: bool = False) -> str:
    rows = list(rows)
    reasons: dict[tuple[str, str, str], int] = {}

    def cell(row: Row, stage: str) -> str:
        found = row.cells[stage]
        if found in SHORT:
            return SHORT[found]
        limit = entries[row.name].limits.get(stage)
        kind = "defect" if limit is None else "limit"
        number = reasons.setdefault((kind, row.name, found if limit is None else limit), len(reasons) + 1)
        return f"{kind} {number}"

    cells = [[r.name, r.group, *(cell(r, stage) for stage in STAGES), f"{r.seconds:.0f}"] for r in rows]
    table = Table(f"{len(rows)} architectures", ("name", "group", *STAGES, ">seconds"), cells)
    parts = [str(table), summary(rows)]
    parts += [f"{kind} {number}: {name}: {reason}" for (kind, name, reason), number in reasons.items()]
    if notes:
        parts += [f"note: {row.name}: {note}" for row in rows for note in row.notes]
    return "\n".join(parts)


def summary(rows: list[Row]) -> str:
    right = Counter(stage for row in rows for stage, found in row.cells.items() if found == YES)
    return ", ".join(f"{stage} {right[stage]}/{len(rows)}" for stage in STAGES)


def as_json(rows: Iterable[Row], entries: Mapping[str, Entry]) -> str:
    def plain(row: Row) -> dict[str, Any]:
        return {**vars(row), "limits": dict(entries[row.name].limits)}

    return json.dumps([plain(row) for row in rows], indent=1)
