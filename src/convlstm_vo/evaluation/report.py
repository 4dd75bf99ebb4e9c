"""What people look at: tables in the terminal, one self-contained HTML page, a picture of a path."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

import convlstm_vo
from convlstm_vo.evaluation import figures
from convlstm_vo.evaluation.baselines import BASELINES
from convlstm_vo.evaluation.evaluate import NETWORK, Evaluation, SequenceResult
from convlstm_vo.evaluation.metrics import Score
from convlstm_vo.evaluation.segments import SegmentSummary
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.geometry.trajectory import Alignment, Trajectory
from convlstm_vo.sequences.base import Frame

ALIGNMENT_NAMES: dict[Alignment, str] = {"none": "none", "scale": "scale", "se3": "SE(3)", "sim3": "Sim(3)"}
_THUMBNAIL_WIDTH = 400
_MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of a score in tables.

    Attributes:
        title, unit: what stands above it.
        value: takes it from a score.
        is_error: whether small is good.
        is_brief: whether the terminal shows it too, which must do with 80 columns.
    """

    title: str
    unit: str
    value: Callable[[Score], float | None]
    is_error: bool = True
    is_brief: bool = True


def _ate(score: Score, alignment: Alignment) -> float | None:
    found = score.ate[alignment]
    return None if found is None else found.rmse_m


def _rpe(score: Score, alignment: Alignment) -> tuple[float | None, float | None]:
    """RPE in metres and in degrees."""
    found = score.rpe[alignment]
    return (None, None) if found is None else (found.translation_rmse_m, found.rotation_rmse_deg)


COLUMNS = (
    Column("t_rel", "%", lambda score: score.t_rel_percent),
    Column("r_rel", "°/100 m", lambda score: score.r_rel_deg_per_100m),
    Column("drift", "%", lambda score: score.end_drift_percent),
    Column("ATE", "m", lambda score: _ate(score, "none")),
    Column("ATE Sim(3)", "m", lambda score: _ate(score, "sim3"), is_brief=False),
    Column("RPE", "m", lambda score: _rpe(score, "none")[0], is_brief=False),
    Column("RPE", "°", lambda score: _rpe(score, "none")[1], is_brief=False),
    Column("segments", "", lambda score: score.overall.segments, is_error=False),
)

EXPLANATIONS = {
    "t_rel": "translation error over path segments of the named lengths, in percent of the length: the mean over "
    "all segments of all lengths, as KITTI's devkit computes it",
    "r_rel": "rotation error over the same segments, in degrees per 100 m",
    "drift": "distance between the last true and the last estimated position, both paths starting at the same "
    "pose, in percent of the path",
    "ATE": "absolute trajectory error: root mean square distance between true and estimated positions; unaligned, "
    "both paths start at the same pose; with Sim(3), the estimate is rotated, moved and scaled for the best fit",
    "RPE": "relative pose error: root mean square error of the motion from each frame to the next, unaligned",
    "zero_motion": "baseline: the camera never moves",
    "constant_motion": "baseline: the mean true motion, repeated (it knows the true mean speed and turn)",
    "straight_ahead": "baseline: the true mean speed, without any rotation",
}


def format_figure(value: float | None) -> str:
    """Three significant digits, or a dash for what does not exist."""
    if value is None:
        return _MISSING
    return f"{value:.0f}" if abs(value) >= 99.95 or isinstance(value, int) else f"{value:#.3g}"


def results_table(evaluation: Evaluation) -> Table:
    """The terminal's table: each sequence with the network and the baselines beside it.

    A figure of the network is green where it beats every baseline, else red.
    """
    brief = [column for column in COLUMNS if column.is_brief]
    table = Table("sequence", "estimate", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption, table.caption_justify = Text(caption(evaluation)), "left"
    for title in (*(f"{column.title}\n{column.unit}" for column in brief), "ms per\nframe"):
        table.add_column(title, justify="right")
    for result in evaluation.results:
        for number, (name, cells) in enumerate(_rows(result.scores, brief)):
            styled = [f"[{style}]{text}[/]" if style else text for text, style in cells]
            ms = format_figure(result.ms_per_frame) if name == NETWORK else ""
            bold = "bold" if name == NETWORK else None
            table.add_row("" if number else result.name, name.replace("_", " "), *styled, ms, style=bold)
        table.add_section()
    return table


def score_table(score: Score) -> Table:
    """The terminal's table for one score: t_rel and r_rel in all and by length, ATE and RPE by alignment."""
    caption_text = f"{score.protocol}; alignment {ALIGNMENT_NAMES[score.alignment]}; {_frames(score)}"
    table = Table("", "segments", "t_rel %", "r_rel °/100 m", caption="\n".join([caption_text, *score.notes]))
    lengths = {f"{length:g} m": summary for length, summary in score.by_length.items()}
    for name, summary in {"all lengths": score.overall, **lengths}.items():
        table.add_row(name, *_summary_cells(summary))
    table.add_section()
    table.add_row("[bold]alignment", "[bold]ATE m", "[bold]RPE m", "[bold]RPE °")
    for alignment, title in ALIGNMENT_NAMES.items():
        table.add_row(title, *_alignment_cells(score, alignment))
    table.add_section()
    drift = f"{format_figure(score.end_drift_percent)} %"
    table.add_row("end drift", f"{format_figure(score.end_drift_m)} m", drift, f"of {score.path_length_m:.1f} m")
    return table


def caption(evaluation: Evaluation) -> str:
    """What the figures of an evaluation refer to: protocols, lengths and alignment, in words."""
    alignments = {result.score.alignment for result in evaluation.results if result.score is not None}
    named = ", ".join(ALIGNMENT_NAMES[alignment] for alignment in sorted(alignments)) or "none"
    of_baselines = "" if named == "none" else " (baselines: none)"
    lines = [f"alignment {named}{of_baselines}; ATE and RPE unaligned but where named", *evaluation.protocols()]
    lines += [f"{name} skipped: {reason}" for name, reason in evaluation.skipped.items()]
    return "\n".join(lines)


def write_report(path: Path | str, evaluation: Evaluation, command: str = "") -> None:
    """Write ``report.html``: one page with every figure and picture, which needs nothing from outside.

    Raises:
        WriteError: the file cannot be written.
    """
    source = importlib.resources.files("convlstm_vo.evaluation").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = format_figure
    page = environment.from_string(source).render(
        columns=COLUMNS,
        explanations=EXPLANATIONS,
        caption=caption(evaluation),
        sequences=[_section(result) for result in evaluation.results],
        mean=evaluation.mean() if len(evaluation.results) > 1 else {},
        command=command,
        version=convlstm_vo.__version__,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_atomically(Path(path), page)


def trajectory_picture(path: Path | str, trajectories: Mapping[str, Trajectory]) -> None:
    """Write a PNG of paths from above (x right, z forward, equal axes); the name ``ground_truth`` is drawn wide."""
    write_atomically(Path(path), figures.png_bytes(figures.from_above(trajectories)))


def _section(result: SequenceResult) -> dict[str, Any]:
    """What the template needs for one sequence."""
    score = result.any_score
    return {
        "name": result.name,
        "frames": _frames(score),
        "path_length_m": score.path_length_m,
        "protocol": str(score.protocol),
        "alignment": ALIGNMENT_NAMES[score.alignment],
        "ms_per_frame": result.ms_per_frame,
        "notes": [] if result.score is None else result.score.notes,
        "rows": list(_rows(result.scores, COLUMNS)),
        "pictures": dict(_pictures(result)),
        "by_length": _table_by(result.scores, "by_length"),
        "by_speed": _table_by(result.scores, "by_speed"),
        "alignments": [(title, _alignment_cells(score, key)) for key, title in ALIGNMENT_NAMES.items()],
        "samples": [_thumbnail(frame, result.samples[0].timestamp_s) for frame in result.samples],
    }


def _pictures(result: SequenceResult) -> Iterator[tuple[str, str]]:
    """Caption and address of each picture of a sequence."""
    # Zero motion is a point from above, and 100 % everywhere else: it would only flatten the curves.
    shown = [name for name in result.scores if name != "zero_motion"]
    paths = {figures.GROUND_TRUTH: result.ground_truth} | {name: result.paths[name] for name in shown}
    yield (
        "The path from above, unaligned from a common start",
        figures.svg_uri(figures.from_above(paths, faint=BASELINES)),
    )
    scores = {name: result.scores[name] for name in shown}
    kinds: tuple[Literal["length", "speed"], ...] = ("length", "speed") if result.any_score.overall.segments else ()
    for key in kinds:
        yield f"Translation error by {key}", figures.svg_uri(figures.errors_by(key, "t_rel_percent", scores))
        yield f"Rotation error by {key}", figures.svg_uri(figures.errors_by(key, "r_rel_deg_per_100m", scores))
    errors = {name: result.errors_over_time(name) for name in shown[:2]}
    yield "Translation error over time", figures.svg_uri(figures.errors_over_time("m", errors))
    yield "Rotation error over time", figures.svg_uri(figures.errors_over_time("deg", errors))


def _rows(scores: Mapping[str, Score], columns: Iterable[Column]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and cells (text and colour) of each score of a sequence."""
    columns, baselines = list(columns), [score for name, score in scores.items() if name != NETWORK]
    for name, score in scores.items():
        best = [_is_best(column, score, baselines) if name == NETWORK else None for column in columns]
        colors = ["" if won is None else "green" if won else "red" for won in best]
        yield name, [(format_figure(c.value(score)), color) for c, color in zip(columns, colors, strict=True)]


def _is_best(column: Column, score: Score, others: list[Score]) -> bool | None:
    """Whether an error is below that of all others; None where that cannot be said."""
    value, rivals = column.value(score), [column.value(other) for other in others]
    known = [rival for rival in rivals if rival is not None]
    return value < min(known) if column.is_error and value is not None and known else None


def _table_by(scores: Mapping[str, Score], key: str) -> dict[str, Any]:
    """t_rel and r_rel of every score for each length or speed."""
    tables: dict[str, dict[float, SegmentSummary]] = {name: getattr(score, key) for name, score in scores.items()}
    values = sorted({value for table in tables.values() for value in table})
    rows = [(f"{value:g}", [_summary_cells(table.get(value)) for table in tables.values()]) for value in values]
    return {"names": list(tables), "rows": rows}


def _summary_cells(summary: SegmentSummary | None) -> list[str]:
    found = summary or SegmentSummary(0, None, None)
    return [str(found.segments), format_figure(found.t_rel_percent), format_figure(found.r_rel_deg_per_100m)]


def _alignment_cells(score: Score, alignment: Alignment) -> list[str]:
    """ATE in metres, RPE in metres, RPE in degrees after one alignment."""
    return [format_figure(value) for value in (_ate(score, alignment), *_rpe(score, alignment))]


def _frames(score: Score) -> str:
    if score.frames == score.ground_truth_frames == score.estimate_frames:
        return f"{score.frames} frames"
    return (
        f"{score.frames} frames matched by {score.matched_by} "
        f"(ground truth {score.ground_truth_frames}, estimate {score.estimate_frames})"
    )


def _thumbnail(frame: Frame, start_s: float) -> dict[str, str]:
    """A small JPEG of a frame as a ``data:`` address, with its time since the first frame."""
    height, width = frame.image.shape[:2]
    image = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR) if frame.image.ndim == 3 else frame.image
    size = (_THUMBNAIL_WIDTH, max(1, round(_THUMBNAIL_WIDTH * height / width)))
    _, encoded = cv2.imencode(".jpg", cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    address = "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()
    return {"address": address, "title": f"frame {frame.index}, {frame.timestamp_s - start_s:.1f} s"}
