"""The loss curve of a run as a picture."""

import os
from collections.abc import Sequence

import numpy as np

from ..base.errors import TrainError
from ..base.files import replacing

POINTS_SHOWN_RAW = 50


def draw(
    path: str | os.PathLike, losses: Sequence[tuple[int, float]], evaluations: Sequence[tuple[int, dict[str, float]]]
) -> None:
    """Training loss with its moving average, the loss of the evaluations, and beside it their first other metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    metric = next((name for _, values in evaluations for name in values if name != "loss"), None)
    figure = Figure(figsize=(10 if metric else 5.5, 3.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panes = figure.subplots(1, 2 if metric else 1, squeeze=False)[0]
    steps, values = [step for step, _ in losses], [value for _, value in losses]
    few = len(values) <= POINTS_SHOWN_RAW
    panes[0].plot(steps, values, color="tab:blue", alpha=1.0 if few else 0.3, label="training")
    if not few:
        panes[0].plot(steps, smooth(values, len(values) // 25), color="tab:blue", label="training, moving average")
    if evaluations:
        points = [(step, v["loss"]) for step, v in evaluations]
        panes[0].plot(*zip(*points, strict=True), "o-", color="tab:orange", label="evaluation")
    panes[0].set(xlabel="step", ylabel="loss")
    panes[0].legend()
    if metric:
        points = [(step, v[metric]) for step, v in evaluations if metric in v]
        panes[1].plot(*zip(*points, strict=True), "o-", color="tab:orange")
        panes[1].set(xlabel="step", ylabel=metric)
    for pane in panes:
        pane.grid(alpha=0.3)
    with replacing(path, TrainError) as temporary:
        figure.savefig(temporary, format="png")


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Mean of the last `width` values at each place."""
    sums = np.cumsum(values)
    sums[width:] -= sums[:-width].copy()
    return sums / np.minimum(np.arange(len(values)) + 1, width)
