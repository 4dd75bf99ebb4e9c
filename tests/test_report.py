"""The terminal's tables, the HTML page and the picture of a path."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.evaluation import figures, report
from convlstm_vo.evaluation.baselines import zero_motion
from convlstm_vo.evaluation.evaluate import Evaluation, evaluate_sequence, evaluate_sequences
from convlstm_vo.evaluation.metrics import score, score_files
from convlstm_vo.geometry.trajectory import Trajectory
from tests.test_evaluate import Drive, drives, path, slightly_wrong

COMMAND = "convlstm-vo evaluate --data 'a <b> & c'"


class Page(HTMLParser):
    """Addresses, text and open tags of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate_sequences(drives(), slightly_wrong)


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(target, evaluation, COMMAND)
    return target.read_text(encoding="utf-8")


def shown(table: Table, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_page_is_whole_and_needs_nothing_from_outside(page: str) -> None:
    found = Page(page)
    assert found.open == []
    assert found.addresses and all(address.startswith("data:image/") for address in found.addresses)
    assert not re.search(r"@import|url\(|<script|<link", page)
    for address in found.addresses:
        assert base64.b64decode(address.split(",", 1)[1], validate=True)


def test_the_page_holds_every_sequence_and_figure(page: str, evaluation: Evaluation) -> None:
    text = " ".join(" ".join(Page(page).text).split())
    assert COMMAND in text
    for result in evaluation.results:
        assert f"All figures of {result.name}" in text
        assert report.format_figure(result.score.t_rel_percent) in text
    for words in ("straight ahead", "segments of 20, 40 m", "alignment none", "test-only skipped: no ground truth"):
        assert words in text
    assert all(meaning in text for meaning in report.EXPLANATIONS.values())


def test_the_page_shows_pictures_and_frames(page: str, evaluation: Evaluation) -> None:
    kinds = [address.split(";")[0] for address in Page(page).addresses]
    assert kinds.count("data:image/svg+xml") == 7 * len(evaluation.results)
    assert kinds.count("data:image/jpeg") == sum(len(result.samples) for result in evaluation.results) == 12


def test_pictures_refer_to_nothing_outside(evaluation: Evaluation) -> None:
    for _, address in report._pictures(evaluation.results[0]):
        svg = base64.b64decode(address.split(",", 1)[1]).decode()
        assert not re.search(r'(href|src)="(?!#)', svg)


def test_baselines_alone_and_paths_without_segments(tmp_path: Path) -> None:
    tiny = Trajectory.from_motions(path(frames=10).motions * 0.01)
    for drive, estimate in ((Drive("a", path()), None), (Drive("tiny", tiny, frames=10), slightly_wrong)):
        report.write_report(tmp_path / "report.html", Evaluation((evaluate_sequence(drive, estimate),)))
        assert Page((tmp_path / "report.html").read_text()).open == []
    assert "holds no segment" in (tmp_path / "report.html").read_text()


def test_a_perfect_and_a_motionless_estimate_can_be_drawn(tmp_path: Path) -> None:
    perfect = evaluate_sequence(Drive("a", path()), lambda sequence: sequence.trajectory)
    still = evaluate_sequence(Drive("b", path()), lambda sequence: zero_motion(sequence.trajectory))
    report.write_report(tmp_path / "report.html", Evaluation((perfect, still)))


def test_colour_frames_become_small_jpegs() -> None:
    frame = dataclasses.replace(Drive("a", None)[3], image=np.full((60, 200, 3), (200, 50, 10), np.uint8))
    thumbnail = report._thumbnail(frame, 0.1)
    data = np.frombuffer(base64.b64decode(thumbnail["address"].split(",")[1]), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert image.shape == (120, 400, 3) and np.allclose(image[60, 200], (10, 50, 200), atol=4)
    assert thumbnail["title"] == "frame 3, 0.2 s"


def test_the_results_table_fits_a_terminal_and_names_its_protocol(evaluation: Evaluation) -> None:
    text = shown(report.results_table(evaluation))
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for words in (
        "network",
        "constant motion",
        "alignment none",
        "short: segments of 20, 40 m",
        "test-only skipped",
    ):
        assert words in text
    for result in evaluation.results:
        assert re.search(rf"{result.name} +network +{report.format_figure(result.score.t_rel_percent)}", text)


def test_green_where_the_network_beats_every_baseline(evaluation: Evaluation) -> None:
    scores = evaluation.results[0].scores
    by_title = {column.title: column for column in report.COLUMNS}
    baselines = [one for name, one in scores.items() if name != "network"]
    assert report._is_best(by_title["t_rel"], scores["network"], baselines) is True
    assert report._is_best(by_title["t_rel"], scores["straight_ahead"], baselines) is False
    assert report._is_best(by_title["segments"], scores["network"], baselines) is None


def test_a_requested_alignment_is_named() -> None:
    caption = report.caption(evaluate_sequences(drives(), slightly_wrong, alignment="sim3"))
    assert caption.startswith("alignment Sim(3) (baselines: none); ")


def test_the_score_table_of_real_files(shared: Path) -> None:
    folder = shared / "trajectories"
    found = score_files(folder / "ground_truth/09.txt", folder / "estimates/09_b_indexed.txt")
    text = " ".join(re.sub(r"[^\w.%(),;/°-]+", " ", shown(report.score_table(found))).split())
    for words in ("all lengths 957 72.1", "Sim(3) 8.39", "1589 frames matched by frame", "alignment none"):
        assert words in text


def test_the_score_table_says_why_a_figure_is_missing() -> None:
    found = score(path(frames=3), zero_motion(path(frames=3)), lengths_m=[20])
    assert "no segment of 20 m" in " ".join(shown(report.score_table(found)).split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (2.0, "2.00"), (0.0986, "0.0986"), (99.99, "100"), (208.05, "208"), (7, "7")],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert report.format_figure(value) == text


def test_a_picture_of_a_path(tmp_path: Path) -> None:
    report.trajectory_picture(tmp_path / "path.png", {"ground_truth": path(), "network": path(1)})
    image = cv2.imread(str(tmp_path / "path.png"))
    assert image.shape[1] == 960 and image.std() > 5


def test_the_picture_from_above_has_equal_axes() -> None:
    for trajectory in (path(), zero_motion(path()), Trajectory.from_motions(np.zeros((0, 6)))):
        figure = figures.from_above({"network": trajectory})
        figure.draw_without_rendering()
        (axes,) = figure.axes
        a, b = axes.transData.transform([[0, 0], [1, 1]])
        assert b[0] - a[0] == pytest.approx(b[1] - a[1])
        assert axes.get_xlim()[0] < trajectory.positions_xyz[:, 0].min()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConvlstmVoError, match=r"report.html: cannot be written"):
        report.write_report(tmp_path / "file" / "report.html", Evaluation(()))
