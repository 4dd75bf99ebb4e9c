"""Drives as sequences and as folders: the same from the same seed, never mixed, continued after an interruption."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo.geometry.camera import CameraError
from convlstm_vo.geometry.files import WriteError
from convlstm_vo.geometry.trajectory import read_kitti, read_times
from convlstm_vo.sequences.base import Sequence, read_image
from convlstm_vo.world import KITTI_CAMERA, Mount, SimulateConfig, WorldError, WorldSequence, endless, simulate

SMALL = KITTI_CAMERA.resized(height=94, width=310)


def config(out: Path, **changes: object) -> SimulateConfig:
    options = {"out": out, "frames": 6, "height": 94, "width": 310, "road": "country", "workers": 1, "seed": 5}
    return SimulateConfig(**{**options, **changes})  # type: ignore[arg-type]


def test_a_seed_gives_the_same_poses_and_frames() -> None:
    a, b = (WorldSequence(5, frames=5, kind="country", camera=SMALL) for _ in range(2))
    assert (a.trajectory.T_world_camera == b.trajectory.T_world_camera).all()
    assert all((a[i].image == b[i].image).all() for i in (4, 0))


def test_seeds_differ() -> None:
    a, b = (WorldSequence(seed, frames=5, kind="country", camera=SMALL) for seed in (5, 6))
    assert not np.allclose(a.trajectory.T_world_camera, b.trajectory.T_world_camera)
    assert np.abs(a[0].image.astype(int) - b[0].image).mean() > 5


def test_frames_do_not_depend_on_the_order_of_asking() -> None:
    a, b = (WorldSequence(5, frames=25, kind="country", camera=SMALL) for _ in range(2))
    late = b[21].image
    assert (next(frame.image for frame in a if frame.index == 21) == late).all()


def test_it_is_a_sequence() -> None:
    world = WorldSequence(5, frames=3, kind="country", camera=SMALL)
    assert isinstance(world, Sequence)
    frames = list(world)
    assert len(world) == len(frames) == 3
    assert frames[0].image.shape == (94, 310) and frames[0].image.dtype == np.uint8
    np.testing.assert_allclose([frame.timestamp_s for frame in frames], [0, 0.1, 0.2])
    assert (world.trajectory.T_world_camera[0] == np.eye(4)).all()


def test_written_and_streamed_drives_are_identical(tmp_path: Path) -> None:
    simulate(config(tmp_path / "w", sequences=2), progress=False)
    stream = endless(5, frames=6, kind="country", camera=SMALL)
    for name, world in zip(("00", "01"), stream, strict=False):
        folder = tmp_path / "w" / "sequences" / name
        for frame in world:
            written = cv2.imread(str(folder / "image_0" / f"{frame.index:06d}.png"), cv2.IMREAD_UNCHANGED)
            assert (written == frame.image).all()
        trajectory = read_kitti(tmp_path / "w" / "poses" / f"{name}.txt")
        np.testing.assert_allclose(trajectory.T_world_camera, world.trajectory.T_world_camera, atol=1e-9)
        np.testing.assert_allclose(read_times(folder / "times.txt"), world.trajectory.timestamps_s, atol=1e-6)


def test_labels_are_written_in_kitti_formats(tmp_path: Path) -> None:
    simulate(config(tmp_path / "w", frames=2, depth=True, flow=True), progress=False)
    folder = tmp_path / "w" / "sequences" / "00"
    world = config(tmp_path / "w", frames=2).sequence(0)
    truth = world.ground_truth(0)
    depth = cv2.imread(str(folder / "depth_0" / "000000.png"), cv2.IMREAD_UNCHANGED) / 256
    near = truth.depth < 200
    np.testing.assert_allclose(depth[near], truth.depth[near], atol=1 / 128)
    flow = cv2.imread(str(folder / "flow_0" / "000000.png"), cv2.IMREAD_UNCHANGED)[..., ::-1].astype(float)
    valid = flow[..., 2] > 0
    np.testing.assert_allclose((flow[valid][:, :2] - 32768) / 64, truth.flow[valid], atol=1 / 64)
    last = cv2.imread(str(folder / "flow_0" / "000001.png"), cv2.IMREAD_UNCHANGED)
    assert not last[..., 0].any()


def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    simulate(config(tmp_path / "a"), progress=False)
    images = tmp_path / "a" / "sequences" / "00" / "image_0"
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    kept = images / "000002.png"
    stamp = kept.stat().st_mtime_ns
    for name in ("000004.png", "000005.png"):
        (images / name).unlink()
    (tmp_path / "a" / "poses" / "00.txt").unlink()
    simulate(config(tmp_path / "a"), progress=False)
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    assert kept.stat().st_mtime_ns == stamp
    assert (tmp_path / "a" / "poses" / "00.txt").exists()


def test_ctrl_c_leaves_whole_files_and_the_next_run_completes_them(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from convlstm_vo.world import *\n"
        "if __name__ == '__main__':\n"
        "    simulate(SimulateConfig(Path(sys.argv[1]), frames=120, height=94, width=310, road='country', seed=5,"
        " workers=2), progress=False)"
    )
    (tmp_path / "run.py").write_text(code)
    out = tmp_path / "w"
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    images = out / "sequences" / "00" / "image_0"
    written = [path for path in images.iterdir() if not path.name.startswith(".")]
    assert 10 <= len(written) < 120
    assert all(read_image(path, size=(94, 310)).any() for path in written)
    (images / ".000119.png.123").write_bytes(b"half")  # as a power cut would leave
    simulate(config(out, frames=120), progress=False)
    assert sorted(path.name for path in images.iterdir()) == [f"{i:06d}.png" for i in range(120)]
    assert read_kitti(out / "poses" / "00.txt").T_world_camera.shape == (120, 4, 4)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorldError, match="holds other files"):
        simulate(config(tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_options_are_not_mixed_in(tmp_path: Path) -> None:
    simulate(config(tmp_path / "a", frames=1), progress=False)
    with pytest.raises(WorldError, match="other options"):
        simulate(config(tmp_path / "a", frames=1, seed=6), progress=False)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match=r"No space left on device.*continues"):
        simulate(config(tmp_path / "a"), progress=False)
    assert not list((tmp_path / "a").rglob("*.png*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "at least one"),
        ({"kind": "moon"}, "one of town"),
        ({"fps": 0.0}, "between 1 and 120"),
        ({"mount": Mount(height_m=-1.0)}, "height -1.0 m"),
        ({"mount": Mount(pitch=1.0)}, "mounting angles"),
    ],
)
def test_impossible_worlds_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(WorldError, match=message):
        WorldSequence(0, **changes)


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"under the road|height"):
        config(tmp_path, camera_height=-0.5)
    with pytest.raises(CameraError, match="field of view"):
        config(tmp_path, fov=0.0)
    with pytest.raises(WorldError, match="frames"):
        dataclasses.replace(config(tmp_path), frames=0)
    with pytest.raises(WorldError, match=r"camera_pitch is 2\.0: --mounting random draws it"):
        config(tmp_path, mounting="random", camera_pitch=2.0)


def test_importing_the_world_loads_no_compiler() -> None:
    code = "import sys, convlstm_vo.world; assert 'numba' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parallel_parts_make_the_same_dataset(tmp_path: Path) -> None:
    simulate(config(tmp_path / "two", frames=40, workers=2), progress=False)
    names = sorted(path.name for path in (tmp_path / "two" / "sequences" / "00" / "image_0").iterdir())
    assert names == [f"{i:06d}.png" for i in range(40)]
    world = config(tmp_path / "two", frames=40).sequence(0)
    for index in (0, 19, 20, 39):
        written = cv2.imread(str(tmp_path / "two" / "sequences" / "00" / "image_0" / names[index]), -1)
        assert (written == world[index].image).all()


@pytest.mark.slow
def test_a_thousand_frames_are_the_same_on_disk_and_in_a_stream(tmp_path: Path) -> None:
    out = tmp_path / "w"
    simulate(config(out, frames=1000, road="town", workers=2), progress=False)
    world = next(endless(5, frames=1000, kind="town", camera=SMALL))
    for frame in world:
        written = read_image(out / "sequences" / "00" / "image_0" / f"{frame.index:06d}.png")
        assert (written == frame.image).all()
    poses = read_kitti(out / "poses" / "00.txt").T_world_camera
    np.testing.assert_allclose(poses, world.trajectory.T_world_camera, atol=1e-8)
