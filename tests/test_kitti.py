"""KITTI trees: real ones, other cameras, and everything that can be wrong with one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import TrajectoryError
from convlstm_vo.sequences import open_stream
from convlstm_vo.sequences.base import Sequence, SequenceError, fit_image, read_image
from convlstm_vo.sequences.kitti import KittiSequence, list_images, open_kitti, sequence_names
from tests.trees import write_tree

IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path, {"00": 5, "town": 4})


def test_a_tree_is_read_in_order(tree: Path) -> None:
    assert sequence_names(tree) == ["00", "town"]
    sequence = KittiSequence(tree, "town")
    assert isinstance(sequence, Sequence)
    assert len(sequence) == 4 and [frame.index for frame in sequence] == [0, 1, 2, 3]
    assert sequence.trajectory is not None
    np.testing.assert_allclose(sequence.trajectory.motions[:, 2], 1.0, atol=1e-9)
    assert sequence[2].timestamp_s == pytest.approx(0.2)


def test_sequences_without_ground_truth_are_read_too(tree: Path) -> None:
    (tree / "poses" / "00.txt").unlink()
    assert KittiSequence(tree, "00").trajectory is None


def test_names_sort_by_number(tree: Path) -> None:
    folder = tree / "sequences" / "town" / "image_0"
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"frame{[1, 2, 10, 20][number]}.png")
    assert [path.stem for path in KittiSequence(tree, "town").images] == ["frame1", "frame2", "frame10", "frame20"]


def test_camera_2_of_a_turning_car_moves_differently(shared: Path, tmp_path: Path) -> None:
    """Only 30 colour frames are in the fixture, so a tree of those is made first."""
    source = shared / "kitti" / "sequences" / "0005"
    target = tmp_path / "sequences" / "0005"
    for camera in (0, 2):
        (target / f"image_{camera}").mkdir(parents=True)
        for image in sorted((source / "image_2").iterdir()):
            (target / f"image_{camera}" / image.name).symlink_to(source / f"image_{camera}" / image.name)
    shutil.copy(source / "calib.txt", target)
    count = len(list((target / "image_2").iterdir()))
    for name, text in {"times": source / "times.txt", "poses": shared / "kitti" / "poses" / "0005.txt"}.items():
        rows = text.read_text().splitlines(keepends=True)[:count]
        path = target / "times.txt" if name == "times" else tmp_path / "poses" / "0005.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(rows))
    gray, colour = KittiSequence(tmp_path, "0005"), KittiSequence(tmp_path, "0005", camera=2)
    assert gray[0].image.ndim == 2 and colour[0].image.shape[2] == 3
    assert gray.trajectory is not None and colour.trajectory is not None
    # P2[0, 3] / fx: camera 2 sits 6 cm to the left of camera 0 on this car.
    baseline = np.array([44.85728 / 721.5377, 0.2163791 / 721.5377, 2.745884e-3])
    baseline[:2] -= 2.745884e-3 * np.array([609.5593, 172.854]) / 721.5377
    T_0_2 = np.eye(4)
    T_0_2[:3, 3] = -baseline
    np.testing.assert_allclose(
        se3.compose(T_0_2, colour.trajectory.T_world_camera, se3.inverse(T_0_2)),
        gray.trajectory.T_world_camera,
        atol=1e-9,
    )
    np.testing.assert_allclose(colour.trajectory.T_world_camera[0], np.eye(4), atol=1e-9)


def test_real_clips(shared: Path) -> None:
    lengths = {
        s.name: s.trajectory.distances_m[-1] for s in open_kitti(shared / "kitti") if s.trajectory is not None
    }
    assert {name: round(float(length)) for name, length in lengths.items()} == {
        "0005": 69,
        "0013": 173,
        "01": 52,
        "06": 60,
    }


def test_a_missing_folder_says_what_there_is(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(SequenceError, match="this tree has the sequences 00, town"):
        KittiSequence(tree, "07")
    with pytest.raises(SequenceError, match="holds sequences/NAME/image_0"):
        open_kitti(tmp_path / "nowhere")


def test_a_truncated_png(tree: Path) -> None:
    path = tree / "sequences" / "00" / "image_0" / "000003.png"
    path.write_bytes(path.read_bytes()[:-200])
    sequence = KittiSequence(tree, "00")
    with pytest.raises(SequenceError, match=r"000003\.png: the PNG is truncated"):
        sequence[3]


def test_a_file_that_is_no_image(tree: Path) -> None:
    path = tree / "sequences" / "00" / "image_0" / "000002.jpg"
    path.write_bytes(b"not an image")
    with pytest.raises(SequenceError, match="cannot be decoded"):
        read_image(path)
    with pytest.raises(SequenceError, match="no such file"):
        read_image(path.with_name("nothing.jpg"))


def test_an_image_of_another_size_in_the_middle(tree: Path) -> None:
    import cv2

    path = tree / "sequences" / "00" / "image_0" / "000002.png"
    cv2.imwrite(str(path), np.zeros((30, 40), np.uint8))
    with pytest.raises(SequenceError, match=r"000002\.png: the image is 30x40, but the first image of sequence 00"):
        list(KittiSequence(tree, "00"))


def test_counts_that_differ(tree: Path) -> None:
    poses = tree / "poses" / "00.txt"
    poses.write_text(IDENTITY * 4)
    with pytest.raises(SequenceError, match=r"00\.txt: 4 poses for 5 images"):
        KittiSequence(tree, "00")
    times = tree / "sequences" / "town" / "times.txt"
    times.write_text("0\n0.1\n")
    with pytest.raises(SequenceError, match="2 times for 4 images"):
        KittiSequence(tree, "town")


@pytest.mark.parametrize("row", [IDENTITY.replace("1", "nan", 1), IDENTITY[2:]])
def test_wrong_pose_rows(tree: Path, row: str) -> None:
    (tree / "poses" / "00.txt").write_text(IDENTITY * 3 + row + IDENTITY)
    with pytest.raises(TrajectoryError, match="line 4"):
        KittiSequence(tree, "00")


def test_calibrations_without_the_camera(tree: Path) -> None:
    calib = tree / "sequences" / "00" / "calib.txt"
    calib.write_text(calib.read_text().replace("P0:", "Q0:"))
    with pytest.raises(SequenceError, match=r"calib\.txt: no line 'P0: …'"):
        KittiSequence(tree, "00")
    calib.write_text("P0: 1 2 3\n")
    with pytest.raises(SequenceError, match="line 1: P0 needs 12 finite numbers"):
        KittiSequence(tree, "00")
    calib.unlink()
    with pytest.raises(SequenceError, match=r"should be a calibration like KITTI's calib\.txt"):
        KittiSequence(tree, "00")


def test_images_of_all_names_and_none_that_are_hidden(tmp_path: Path) -> None:
    for name in ("10.tiff", "9.PNG", "._9.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["9.PNG", "10.tiff"]


def test_times_must_increase(tree: Path) -> None:
    path = tree / "sequences" / "00" / "times.txt"
    times = path.read_text().splitlines()
    times[3] = times[2]
    path.write_text("\n".join(times))
    with pytest.raises(TrajectoryError, match=r"times\.txt, row 4: 0\.2 s does not follow 0\.2 s"):
        KittiSequence(tree, "00")


def test_files_from_windows_and_folders_without_images(tree: Path) -> None:
    for name in ("sequences/00/calib.txt", "sequences/00/times.txt", "poses/00.txt"):
        path = tree / name
        path.write_text("\ufeff" + path.read_text(), encoding="utf-8")  # as its editors begin a file
    (tree / "sequences" / "21").mkdir()  # as KITTI's calibrations unpack
    assert [sequence.name for sequence in open_kitti(tree)] == ["00", "town"]


def test_open_stream_on_trees(tree: Path) -> None:
    folder = str(tree / "sequences" / "00")
    assert isinstance(open_stream(folder), KittiSequence)
    better = open_stream(folder, lambda height, width: Camera(99.0, 98.0, 80.0, 24.0, height=height, width=width))
    assert better.camera.fx == 99
    with pytest.raises(SequenceError, match=r"--topic /image: is for ROS bags"):
        open_stream(folder, topic="/image")
    with pytest.raises(SequenceError, match=r"--fps 30: is for folders of images"):
        open_stream(folder, fps=30)
    with pytest.raises(SequenceError, match="name one of its sequences"):
        open_stream(str(tree))


def test_fit_image_shrinks_without_aliasing_and_converts_channels() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 64))
    small = fit_image(stripes, height=16, width=32, channels=3)
    assert small.shape == (16, 32, 3) and set(np.unique(small)) <= {127, 128}
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1] = 100
    assert fit_image(colour, height=8, width=8, channels=1)[0, 0, 0] == 59  # 0.587 * 100
