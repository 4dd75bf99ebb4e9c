"""Distortion from a drive: rendered streets whose lens is known, and real frames that were bent."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convlstm_vo import cli
from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.self_calibration import Bend, SelfCalibrationError, find_bend, opencv_coefficients
from convlstm_vo.sequences.base import Frame
from convlstm_vo.sequences.calibration import lens_from_ros, write_ros
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.sequences.lens import Lens, Undistorted
from convlstm_vo.world import WorldSequence
from convlstm_vo.world.lens import Distortion

KITTI = Path(__file__).parents[2] / "shared" / "kitti"
CAMERA = Camera(350.0, 350.0, 309.5, 93.5, height=192, width=624)
BARREL = Distortion(-0.3, 0.08)


def street(frames: int, distortion: Distortion | None = None) -> WorldSequence:
    return WorldSequence(5_000_000, kind="country", frames=frames, camera=CAMERA, distortion=distortion)


@pytest.fixture(scope="module")
def bent_street() -> tuple[WorldSequence, list[Frame]]:
    drive = street(62, BARREL)
    return drive, list(drive)


@given(st.floats(-0.5, 0.3), st.floats(0.5, 1.2), st.floats(0, 6.28))
def test_coefficients_are_those_of_the_division_model(bend: float, corner: float, angle: float) -> None:
    if bend * corner**2 < -0.7:
        bend = -0.7 / corner**2
    coefficients = np.array(opencv_coefficients(bend, corner))
    seen = np.linspace(0, corner, 50)[:, None] * [np.cos(angle), np.sin(angle)]
    rays = seen / (1 + bend * (seen**2).sum(1, keepdims=True))
    solid = np.concatenate([rays, np.ones((50, 1))], 1)
    found = cv2.projectPoints(solid, np.zeros(3), np.zeros(3), np.eye(3), coefficients)[0][:, 0]
    assert np.abs(found - seen).max() < 1e-4  # focal lengths: a few hundredths of a pixel


def test_the_images_edges_subtend_the_field_of_view() -> None:
    camera = Camera.from_fov(100, height=376, width=1241)
    lens = Bend(-0.2, 0.01, 60).lens(camera, fov_deg=100)
    assert lens.camera.fx / camera.fx == pytest.approx(1 / (1 - 0.2 * np.tan(np.radians(50)) ** 2))
    left, right = (lens._rays(np.array([x]), np.array([camera.cy]))[0, 0] for x in (-0.5, 1240.5))
    assert np.degrees(np.arctan(right) - np.arctan(left)) == pytest.approx(100, abs=0.01)
    assert Bend(-0.2, 0.01, 60).lens(camera).camera == camera


def test_a_barrel_is_found_on_a_street(bent_street: tuple[WorldSequence, list[Frame]]) -> None:
    _, frames = bent_street
    steps: list[int] = []
    found = find_bend(load_checkpoint(), frames, CAMERA, steps.append)  # type: ignore[arg-type]
    assert found.clear and found.pairs == len(steps) >= 50
    lens, true = found.lens(CAMERA), Lens(CAMERA, (BARREL.k1, BARREL.k2, 0.0, 0.0))
    x, y = np.meshgrid(np.arange(20.0, 604, 20), np.arange(4.0, 192, 20))
    off = [candidate._rays(x.ravel(), y.ravel()) for candidate in (lens, true, Lens(CAMERA, (0.0,) * 4))]
    assert np.abs(off[0] - off[1]).max() < 0.25 * np.abs(off[2] - off[1]).max()


def test_a_lens_that_bends_nothing_is_left_alone() -> None:
    found = find_bend(load_checkpoint(), street(42), CAMERA)  # type: ignore[arg-type]
    assert not found.clear and abs(found.bend) < 0.06


def test_run_finds_the_distortion(
    tmp_path: Path, bent_street: tuple[WorldSequence, list[Frame]], capsys: pytest.CaptureFixture[str]
) -> None:
    drive, frames = bent_street
    (tmp_path / "bent").mkdir()
    for frame in frames[:42]:
        cv2.imwrite(str(tmp_path / "bent" / f"{frame.index:04}.png"), frame.image)
    edge = Lens(CAMERA, (BARREL.k1, BARREL.k2, 0.0, 0.0))._rays(np.array([623.5]), np.array([93.5]))[0, 0]
    fov = ["--fov", f"{2 * np.degrees(np.arctan(edge)):.3f}"]
    ways = {}
    for name, options in {
        "as it is": fov,
        "found": [*fov, "--find-distortion"],
        "again": ["--calib", str(tmp_path / "found" / "camera.yaml")],
    }.items():
        cli.main(["run", str(tmp_path / "bent"), *options, "--out", str(tmp_path / name)])
        ways[name] = (tmp_path / name / "trajectory.txt").read_text()
    said = capsys.readouterr().out
    assert "distortion found (-0." in said and "for --calib:" in said
    assert ways["again"] == ways["found"]
    true = float(drive.trajectory.distances_m[41])
    off = {}
    for name, text in ways.items():
        places = np.array([row.split() for row in text.splitlines()], float).reshape(-1, 3, 4)[:, :, 3]
        off[name] = abs(np.linalg.norm(np.diff(places, axis=0), axis=1).sum() / true - 1)
    assert off["found"] < 0.06 < 0.15 < off["as it is"]
    out = ["--distance", f"{true:.2f}", "--out", str(tmp_path / "car.json")]
    cli.main(["calibrate", str(tmp_path / "bent"), *fov, "--find-distortion", *out])
    assert (tmp_path / "car-camera.yaml").read_bytes() == (tmp_path / "found" / "camera.yaml").read_bytes()
    assert VehicleCalibration.read(tmp_path / "car.json").camera_height_m == pytest.approx(1.65, rel=0.06)
    with pytest.raises(SystemExit):
        cli.main(["run", str(tmp_path / "bent"), *ways_to_tell(), "--find-distortion", "--out", str(tmp_path)])
    assert "--find-distortion: the distortion is given already" in capsys.readouterr().err
    few = tmp_path / "few"
    few.mkdir()
    for frame in frames[:12]:
        cv2.imwrite(str(few / f"{frame.index:04}.png"), frame.image)
    with pytest.raises(SystemExit):
        cli.main(["run", str(few), *fov, "--find-distortion", "--out", str(tmp_path / "no")])
    message = capsys.readouterr().err
    assert f"{few}: the first minute has" in message and "begin where the car drives" in message
    assert not (tmp_path / "no").exists()


def ways_to_tell() -> list[str]:
    return ["--intrinsics", "350", "350", "309.5", "93.5", "--distortion", "-0.3", "0.08", "0", "0"]


def test_a_live_camera_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Live:
        name, camera, live = "camera0", CAMERA, True

    monkeypatch.setattr("convlstm_vo.sequences.open_stream", lambda *arguments, **options: Live())
    with pytest.raises(SystemExit):
        cli.main(["run", "0", "--fov", "80", "--find-distortion"])
    assert "a live source does not show again; record a minute" in capsys.readouterr().err


def test_a_camera_that_stands_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    wall = rng.integers(0, 256, (192, 624), dtype=np.uint8)
    frames = [
        Frame(np.clip(wall + rng.integers(-2, 3, wall.shape), 0, 255).astype(np.uint8), k / 10, k)
        for k in range(25)
    ]
    with pytest.raises(SelfCalibrationError, match="has 0 pairs of frames"):
        find_bend(load_checkpoint(), frames, CAMERA)  # type: ignore[arg-type]


def test_a_written_lens_is_read_again(tmp_path: Path) -> None:
    for lens in (
        Bend(-0.3, 0.01, 60).lens(CAMERA),
        Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004, 0.0)),
        Lens(CAMERA, (-0.02, 0.004, -0.001, 0.0002), "equidistant"),
    ):
        write_ros(tmp_path / "camera.yaml", lens)
        assert lens_from_ros(tmp_path / "camera.yaml") == lens


@pytest.mark.skipif(not KITTI.is_dir(), reason="no ../shared/kitti")
def test_real_frames_through_a_barrel() -> None:
    sequence = KittiSequence(KITTI, "06")
    size = {"height": 330, "width": 1000}
    camera = sequence.camera.cropped(top=23, left=110, **size)
    bend = -0.3
    x, y = np.meshgrid(np.arange(1000.0), np.arange(330.0))
    seen = np.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy], -1)
    rays = seen / (1 + bend * (seen**2).sum(-1, keepdims=True))
    K = sequence.camera
    at = (rays * [K.fx, K.fy] + [K.cx, K.cy]).astype(np.float32)
    frames = [
        Frame(cv2.remap(f.image, at[..., 0], at[..., 1], cv2.INTER_CUBIC), f.timestamp_s, f.index)  # type: ignore[arg-type]
        for f in sequence
    ]
    net = load_checkpoint()
    found = find_bend(net, frames, camera)  # type: ignore[arg-type]
    assert found.clear and found.bend == pytest.approx(bend, abs=0.12)

    class Bent:
        name = "bent"

        def __init__(self) -> None:
            self.camera = camera

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(frames)

    true = float(sequence.trajectory.distances_m[-1])  # type: ignore[union-attr]
    as_it_is = float(estimate_trajectory(net, Bent()).distances_m[-1]) / true
    straight = float(estimate_trajectory(net, Undistorted(Bent(), found.lens(camera))).distances_m[-1]) / true
    assert abs(straight - 1) < 0.02 and abs(straight - 1) < abs(as_it_is - 1)
