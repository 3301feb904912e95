"""Aten graphs as data: edits, the one table of operators, sites and uses of weights, masks, graph passes."""
