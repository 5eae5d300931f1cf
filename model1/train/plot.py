"""The loss plot of a run. Needs matplotlib; without it the JSONL log is all there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from model1.train.log import read_log


def plot_losses(logs: dict[str, Path], out: Path) -> bool:
    """Draw loss over tokens for each named log file into a PNG; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="tokens", ylabel="cross-entropy, nats per token")
    for name, path in logs.items():
        records = read_log(path)
        for key, style in (("cross_entropy", "-"), ("valid_cross_entropy", "o--")):
            points = [(r["tokens"], r[key]) for r in records if key in r]
            if points:
                label = name if style == "-" else f"{name}, held out"
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)
    return True
