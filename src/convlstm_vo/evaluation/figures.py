"""The pictures of a report, as matplotlib figures that no global state touches.

Figures have no background and neutral inks, so that they read on a light and on a dark page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from convlstm_vo.evaluation.evaluate import FrameErrors
from convlstm_vo.evaluation.metrics import Score
from convlstm_vo.geometry.trajectory import Trajectory

INK = "#7d8590"
GROUND_TRUTH = "ground_truth"
_COLORS = {
    GROUND_TRUTH: "#8b949e",
    "network": "#2f81f7",
    "constant_motion": "#d9822b",
    "straight_ahead": "#3f9d63",
    "zero_motion": "#b569c9",
}
_OTHER_COLORS = ("#2f81f7", "#e5534b", "#3f9d63", "#b569c9", "#d9822b")
_BASELINE_STYLE: dict[str, Any] = {"linewidth": 1.1, "linestyle": (0, (4, 2)), "alpha": 0.9}
# In small pictures the legend stands above the axes, where it cannot hide a curve.
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
_MARGIN = 0.06  # around the paths, of their extent
_PROPORTION = 0.8  # height to width of the picture from above
_SMALLEST_EXTENT_M = 1.0

Measure = Literal["t_rel_percent", "r_rel_deg_per_100m"]
_MEASURE_LABELS: dict[Measure, str] = {"t_rel_percent": "t_rel (%)", "r_rel_deg_per_100m": "r_rel (°/100 m)"}


def from_above(paths: Mapping[str, Trajectory], *, faint: Iterable[str] = ()) -> Figure:
    """Paths in the x-z plane of their common world (x right, z forward), with equal axes.

    Args:
        paths: by name; the start of the first one is marked.
        faint: names that are drawn thinly and may leave the picture, such as baselines.
    """
    figure, axes = _picture(width=6.4, height=6.4 * _PROPORTION)
    faint = set(faint)
    for number, (name, path) in enumerate(paths.items()):
        x, _, z = path.positions_xyz.T
        style = _BASELINE_STYLE if name in faint else {"linewidth": 4.0 if name == GROUND_TRUTH else 1.8}
        axes.plot(x, z, color=_color(name, number), label=_title(name), **style)
    first = next(iter(paths.values())).positions_xyz[0]
    axes.plot(first[0], first[2], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK, label="start")
    _set_equal_limits(axes, [path for name, path in paths.items() if name not in faint])
    _label(axes, "x, right (m)", "z, forward (m)")
    axes.legend(**_LEGEND)
    return figure


def errors_by(key: Literal["length", "speed"], measure: Measure, scores: Mapping[str, Score]) -> Figure:
    """t_rel or r_rel against the segments' length or the camera's speed; the first score is drawn wide."""
    figure, axes = _picture(width=5.2, height=3.2)
    for number, (name, score) in enumerate(scores.items()):
        found = score.by_length if key == "length" else score.by_speed
        points = {x: getattr(summary, measure) for x, summary in found.items() if summary.segments}
        style = _line_style(name, number)
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, **style)
        axes.set_xticks(sorted(points))
    _use_log_scale(axes)
    _label(axes, "segment length (m)" if key == "length" else "speed (m/s)", _MEASURE_LABELS[measure])
    figure.legend(loc="outside upper center", ncols=3, **_LEGEND)
    return figure


def errors_over_time(unit: Literal["m", "deg"], errors: Mapping[str, FrameErrors]) -> Figure:
    """Error of each frame's translation in metres or rotation in degrees; the first one is drawn wide."""
    figure, axes = _picture(width=5.2, height=3.2)
    for number, (name, error) in enumerate(errors.items()):
        values = error.translation_m if unit == "m" else error.rotation_deg
        axes.plot(error.time_s, values, **_line_style(name, number))
    axes.set_ylim(bottom=0)
    what = "translation error per frame (m)" if unit == "m" else "rotation error per frame (°)"
    _label(axes, "time (s)", what)
    figure.legend(loc="outside upper center", ncols=3, **_LEGEND)
    return figure


def svg_uri(figure: Figure) -> str:
    """The figure as a ``data:`` address that needs nothing from outside."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, facecolor="white")
    return stream.getvalue()


def _line_style(name: str, number: int) -> dict[str, Any]:
    """A wide line for the first of several curves, thin dashes for those it is compared with."""
    line = {"linewidth": 1.8} if number == 0 else _BASELINE_STYLE
    return {**line, "color": _color(name, number), "label": _title(name)}


def _use_log_scale(axes: Axes) -> None:
    """A network and a baseline may be a factor of 50 apart; zero errors leave the scale as it is."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if not len(values) or values.min() <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Within less than a decade there may be no power of ten to label.
    narrow = values.max() / values.min() < 10
    axes.yaxis.set_minor_formatter(axes.yaxis.get_major_formatter() if narrow else NullFormatter())


def _picture(*, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of the given size in inches with one pair of axes, in the report's style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(color=INK, alpha=0.22, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _set_equal_limits(axes: Axes, paths: list[Trajectory]) -> None:
    """Limits around the paths, of the picture's own proportions, so that a metre is as long in x as in z."""
    ground = np.concatenate([path.positions_xyz[:, [0, 2]] for path in paths])
    low, high = ground.min(axis=0), ground.max(axis=0)
    height = max(high[1] - low[1], _PROPORTION * (high[0] - low[0]), _SMALLEST_EXTENT_M) * (1 + 2 * _MARGIN)
    middle, half = (low + high) / 2, np.array([height / _PROPORTION, height]) / 2
    axes.set_xlim(middle[0] - half[0], middle[0] + half[0])
    axes.set_ylim(middle[1] - half[1], middle[1] + half[1])
    axes.set_aspect("equal")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _color(name: str, number: int) -> str:
    return _COLORS.get(name, _OTHER_COLORS[number % len(_OTHER_COLORS)])
