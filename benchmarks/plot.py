"""The picture for README and docs: one panel of bars per measure, the range as a whisker (extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.figures import FLOOR, OURS, Measure

COLOURS = {FLOOR: "#9aa5b1", OURS: "#1f6feb"}
"""By a contender's name up to a comma; OTHERS for everybody else."""
OTHERS = "#d0893c"


def available() -> bool:
    """Return whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(path: Path, measures: Sequence[Measure], about: dict[str, str]) -> None:
    """Write the picture, in the format that the file's name ends in (SVG, PNG)."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    shown = [(measure, [one for one in measure.series if one.runs]) for measure in measures]
    shown = [(measure, bars) for measure, bars in shown if bars]
    heights = [0.9 + 0.28 * len(bars) for _, bars in shown]
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for (measure, bars), panel in zip(shown, panels[:, 0], strict=True):
        middles = [one.median for one in bars]
        ranges = [
            [middle - min(one.runs) for one, middle in zip(bars, middles, strict=True)],
            [max(one.runs) - middle for one, middle in zip(bars, middles, strict=True)],
        ]
        colours = [COLOURS.get(one.name.split(",")[0], OTHERS) for one in bars]
        drawn = panel.barh([one.name for one in bars], middles, color=colours, xerr=ranges, ecolor="#444", height=0.7)
        panel.bar_label(drawn, [f" {middle:,.{0 if middle >= 100 else 2}f}" for middle in middles], fontsize=8)
        panel.set_title(f"{measure.what} ({measure.unit})", fontsize=9, loc="left")
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"PostgreSQL {about['PostgreSQL']}, Python {about['Python']}, {about['machine']}", fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
