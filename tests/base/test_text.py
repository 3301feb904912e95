"""Tables: one record, two ways to print it."""

from subgraph_peft.base.text import Table, grouped, layered

TABLE = Table("Sizes", ["name", ">size", "note"], [("a|b", "1", ""), ("[c]", "20", "")])


def test_a_table_prints_for_a_terminal_with_its_cells_as_they_are() -> None:
    lines = [line.rstrip() for line in str(TABLE).splitlines()]
    assert lines[0] == "Sizes" and lines[-2:] == ["a|b  │    1 │", "[c]  │   20 │"]


def test_a_table_prints_as_markdown() -> None:
    heads = ["| name | size | note |", "| --- | --- | --- |"]
    assert TABLE.markdown() == [*heads, "| a\\|b | 1 |  |", "| [c] | 20 |  |", ""]


def test_empty_columns_are_left_out() -> None:
    assert TABLE.without_empty() == Table("Sizes", ["name", ">size"], [["a|b", "1"], ["[c]", "20"]])


def test_rows_of_alike_layers_are_one() -> None:
    rows = [("h.0.up.weight", "4"), ("h.1.up.weight", "4"), ("h.2.up.weight", "5"), ("head.weight", "4")]
    assert grouped(rows) == [("h.*.up", "2", "4"), ("h.2.up", "1", "5"), ("head", "1", "4")]
    assert layered("0.weight") == "0" and layered("a.10.b.weight") == "a.*.b"
