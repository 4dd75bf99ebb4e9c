"""The odometer: the same numbers as on clips, one state for the whole stream, errors before nonsense."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from convlstm_vo import cli
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import read_kitti, read_tum
from convlstm_vo.models import fixed, kernels
from convlstm_vo.models.checkpoint import build, save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.odometer import (
    COMPILING,
    Key,
    OdometryError,
    TrackedFrame,
    VisualOdometry,
    compiles_first,
    estimate_trajectory,
    read_mask,
)
from convlstm_vo.recorder import PathSketch, TrajectoryFile
from convlstm_vo.sequences.base import Frame, SequenceError
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training.cache import decode_sequence
from convlstm_vo.training.clips import collate, sequential_clips
from convlstm_vo.world import WorldSequence
from tests.trees import write_tree

NET = OdometryNet(preset("tiny", image_height=48, image_width=160), seed=1).eval()


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> KittiSequence:
    return KittiSequence(write_tree(tmp_path_factory.mktemp("tree"), {"00": 9}), "00")


def tracked(index: int, T_world_camera: np.ndarray) -> TrackedFrame:
    return TrackedFrame(index, index / 10, np.eye(4), T_world_camera, 0.0)


def test_streaming_gives_the_motions_of_the_clips_that_training_sees(sequence: KittiSequence) -> None:
    decoded = decode_sequence(sequence, height=48, width=160, channels=1)
    state, motions = None, []
    with torch.inference_mode():
        for clip in sequential_clips(len(sequence), 3):
            batch = collate([decoded], (clip,))
            output, state = NET(batch.images, batch.intrinsics, state)
            motions.append(output[0].double().numpy())
    streamed = [
        se3.motion_from_matrix(t.T_prev_curr) for t in VisualOdometry(NET, sequence.camera).stream(sequence)
    ]
    np.testing.assert_allclose(np.array(streamed[1:]), np.concatenate(motions), atol=1e-5)
    np.testing.assert_array_equal(streamed[0], np.zeros(6))


def test_poses_chain_the_motions(sequence: KittiSequence) -> None:
    results = list(VisualOdometry(NET, sequence.camera).stream(sequence))
    for before, after in itertools.pairwise(results):
        np.testing.assert_allclose(after.T_world_camera, before.T_world_camera @ after.T_prev_curr, atol=1e-12)


def test_the_state_is_carried_until_it_is_reset(sequence: KittiSequence) -> None:
    odometer = VisualOdometry(NET, sequence.camera)
    first = [t.T_world_camera for t in odometer.stream(sequence)]
    odometer.reset()
    again = [t.T_world_camera for t in odometer.stream(sequence)]
    np.testing.assert_array_equal(first, again)
    forgetful = []
    for i in range(1, len(sequence)):
        odometer.reset()
        odometer.track(sequence[i - 1])
        forgetful.append(odometer.track(sequence[i]).T_prev_curr)
    carried = [t.T_prev_curr for t in VisualOdometry(NET, sequence.camera).stream(sequence)][1:]
    np.testing.assert_allclose(forgetful[0], carried[0], atol=1e-7)
    assert not np.allclose(forgetful[-1], carried[-1], atol=1e-5)


def test_a_network_that_has_warmed_up_begins_afresh() -> None:
    camera = Camera(360.0, 360.0, 160.0, 60.0, height=120, width=320)
    noise = np.random.default_rng(1).integers(0, 256, (2, 120, 320), dtype=np.uint8)
    frames = [Frame(image, i / 10, i) for i, image in enumerate(noise)]
    warm, cold = (VisualOdometry.from_checkpoint(camera=camera) for _ in range(2))
    warm.warm_up()
    assert not compiles_first(warm.net) and not compiles_first(NET)
    for one, other in zip(warm.stream(frames), cold.stream(frames), strict=True):
        np.testing.assert_array_equal(one.T_world_camera, other.T_world_camera)


def test_the_user_is_told_of_what_is_compiled_first(sequence, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda: False)
    cli.main(["run", str(sequence.root / "sequences" / "00"), "--out", str(tmp_path)])
    assert COMPILING in capfd.readouterr().err
    assert read_kitti(tmp_path / "trajectory.txt").T_world_camera.shape == (9, 4, 4)


def test_a_checkpoint_gives_the_same_trajectory(sequence: KittiSequence, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", NET)
    odometer = VisualOdometry.from_checkpoint(tmp_path / "net", sequence.camera)
    poses = [t.T_world_camera for t in odometer.stream(sequence)]
    np.testing.assert_array_equal(poses, estimate_trajectory(NET, sequence).T_world_camera)


def test_memory_does_not_grow(sequence: KittiSequence) -> None:
    """All that an odometer holds on to is of the size that it had after the second frame."""
    odometer = VisualOdometry(NET, sequence.camera)

    def held() -> int:
        assert odometer._previous is not None
        tensors = [odometer._previous, *(odometer._state or ())]
        return sum(tensor.numel() for tensor in tensors)

    odometer.track(sequence[0])
    odometer.track(sequence[1])
    after_two = held()
    for _ in range(5):
        for frame in sequence:
            odometer.track(frame)
    assert held() == after_two
    assert set(vars(odometer)) == set(vars(VisualOdometry(NET, sequence.camera)))


def test_colour_frames_for_a_gray_network(sequence: KittiSequence) -> None:
    odometer = VisualOdometry(NET, sequence.camera)
    gray, colour = sequence[0], sequence[1]
    odometer.track(gray)
    expected = VisualOdometry(NET, sequence.camera)
    expected.track(gray)
    rgb = dataclasses.replace(colour, image=np.repeat(colour.image[..., None], 3, -1))
    np.testing.assert_allclose(odometer.track(rgb).T_prev_curr, expected.track(colour).T_prev_curr, atol=1e-6)


def test_frames_of_another_size(sequence: KittiSequence) -> None:
    camera = Camera(100, 100, 50, 50, height=100, width=100)
    with pytest.raises(OdometryError, match=r"000000\.png: the image is 48x160, but the camera's is 100x100"):
        VisualOdometry(NET, camera).track(sequence[0])


def test_a_network_that_gives_nan_is_reported(sequence: KittiSequence) -> None:
    broken = OdometryNet(NET.config, seed=0)
    with torch.no_grad():
        for parameter in broken.head.parameters():
            parameter.fill_(torch.nan)
    odometer = VisualOdometry(broken, sequence.camera)
    odometer.track(sequence[0])
    with pytest.raises(OdometryError, match=r"000001\.png: the network gave the motion \[nan"):
        odometer.track(sequence[1])
    assert odometer._state is None  # none that is spoilt


def test_frames_and_results_are_the_caller_s_own(sequence: KittiSequence) -> None:
    """A camera may fill one buffer again and again, and who gets a pose or covariance may change it."""
    camera = Camera(360.0, 360.0, 160.0, 60.0, height=120, width=320)
    noise = np.random.default_rng(2).integers(0, 256, (4, 120, 320), dtype=np.uint8)
    small = preset("tiny", image_height=120, image_width=320)
    for net in (build(preset("geometric"), seed=0), OdometryNet(small, seed=0)):
        untouched, odometer = VisualOdometry(net, camera), VisualOdometry(net, camera)
        buffer = np.empty((120, 320), np.uint8)
        for i, image in enumerate(noise):
            buffer[:] = image
            expected = untouched.track(Frame(image.copy(), i / 30, i))
            found = odometer.track(Frame(buffer, i / 30, i))
            np.testing.assert_array_equal(found.T_world_camera, expected.T_world_camera)
            if expected.covariance is not None:
                np.testing.assert_array_equal(found.covariance, expected.covariance)
                assert found.covariance is not None
                found.covariance[:] = 1e6
            found.T_world_camera[:] = 1e6


def test_images_that_are_no_grey_levels_are_refused(sequence: KittiSequence) -> None:
    frame = dataclasses.replace(sequence[0], image=sequence[0].image / np.float32(255))
    with pytest.raises(OdometryError, match=r"000000\.png: the image is float32, but frames are uint8"):
        VisualOdometry(NET, sequence.camera).track(frame)


def test_trajectory_files_appear_when_they_are_whole(tmp_path: Path) -> None:
    poses = se3.matrix_from_motion(np.random.default_rng(0).normal(size=(4, 6)))
    for name, read in (("kitti", read_kitti), ("tum", read_tum)):
        path = tmp_path / f"{name}.txt"
        with TrajectoryFile(path, name) as file:  # type: ignore[arg-type]
            for i, pose in enumerate(poses):
                file.add(tracked(i, pose))
            assert not path.exists()
        np.testing.assert_allclose(read(path).T_world_camera, poses, atol=1e-14)


@pytest.mark.parametrize("error", [ValueError, ConnectionResetError, FileNotFoundError, KeyboardInterrupt])
def test_what_was_tracked_before_an_error_or_an_interruption_is_kept(tmp_path: Path, error: type) -> None:
    path = tmp_path / "trajectory.txt"
    path.write_text("of an earlier run\n")
    with pytest.raises(error), TrajectoryFile(path, "kitti") as file:
        file.add(tracked(0, np.eye(4)))
        raise error
    expected = path if error is KeyboardInterrupt else tmp_path / "trajectory.partial.txt"
    assert file.written == expected and len(read_kitti(expected)) == 1
    if error is not KeyboardInterrupt:
        assert path.read_text() == "of an earlier run\n"
        with TrajectoryFile(path, "kitti") as file:
            file.add(tracked(0, np.eye(4)))
    assert list(tmp_path.iterdir()) == [path] and file.written == path


def test_an_error_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError), TrajectoryFile(tmp_path / "trajectory.txt", "kitti") as file:
        raise OSError
    assert file.written is None and not list(tmp_path.iterdir())


def test_sketches_stay_small_and_cover_the_whole_path() -> None:
    sketch = PathSketch(limit=16)
    for i in range(1000):
        pose = np.eye(4)
        pose[2, 3] = i
        sketch.add(tracked(i, pose))
    z = sketch.trajectory().positions_xyz[:, 2]
    assert len(z) < 16 and z[0] == 0 and z[-1] > 850
    assert len(set(np.diff(z))) == 1


def test_a_mask_hides_what_it_covers_for_ever() -> None:
    """A bonnet of moving noise, so that only the mask can tell."""
    sequence = WorldSequence(34, frames=8, kind="town", camera=Camera(363.6, 363.6, 309.5, 93.5, 240, 624))
    rng, mask = np.random.default_rng(0), np.full((240, 624), 255, np.uint8)
    mask[190:] = 0
    noisy = [np.where(mask == 0, rng.integers(0, 256, mask.shape, np.uint8), f.image) for f in sequence]
    way = float(np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1).sum())
    odometer = VisualOdometry.from_checkpoint(camera=sequence.camera, mask=mask)
    odometer.warm_up()
    motions = [odometer.track(Frame(image, k / 10, k)).T_prev_curr for k, image in enumerate(noisy)]
    found = sum(float(np.linalg.norm(T[:3, 3])) for T in motions)
    assert found == pytest.approx(way, rel=0.1)
    assert odometer._state is not None
    assert bool((odometer._state[-2][:, 24:] == fixed.TOLD).all())


def test_masks_that_cannot_be(sequence: KittiSequence, tmp_path: Path) -> None:
    camera, path = sequence.camera, tmp_path / "mask.png"
    with pytest.raises(OdometryError, match="no such mask"):
        read_mask(path, camera)
    cv2.imwrite(str(path), np.zeros((camera.height, camera.width), np.uint8))
    with pytest.raises(OdometryError, match=r"mask\.png: the mask is black all over"):
        read_mask(path, camera)
    cv2.imwrite(str(path), np.ones((camera.height, camera.width + 1), np.uint8))
    with pytest.raises(OdometryError, match="but the camera's images are"):
        read_mask(path, camera)
    painted = np.full((camera.height, camera.width, 4), 255, np.uint8)
    painted[-9:, :, 3] = 0  # rubbed out
    painted[:5, :, :3] = 9  # black as JPEG has it
    cv2.imwrite(str(path), painted)
    found = read_mask(path, camera)
    cv2.imwrite(str(path), (found > 0).astype(np.uint8))  # labels
    np.testing.assert_array_equal(read_mask(path, camera), found)
    assert not found[-9:].any() and not found[:5].any() and (found[5:-9] == 255).all()
    path.write_bytes(b"no image")
    with pytest.raises(SequenceError, match="the PNG is truncated"):
        read_mask(path, camera)
    mask = np.ones((camera.height, camera.width), np.uint8)
    with pytest.raises(OdometryError, match="takes no mask"):
        VisualOdometry(NET, camera, mask=mask)
    with pytest.raises(OdometryError, match="but the camera's images are"):
        VisualOdometry.from_checkpoint(camera=camera, mask=mask[1:])


def test_a_frame_needs_no_source(sequence: KittiSequence) -> None:
    image = np.zeros((10, 10), np.uint8)
    with pytest.raises(OdometryError, match="frame 7: the image is 10x10"):
        VisualOdometry(NET, sequence.camera).track(Frame(image, 0.0, 7))


@pytest.mark.parametrize(
    ("fps", "apart"), [(5, 1), (10, 1), (12, 1), (15, 1), (20, 2), (25, 2), (29.97, 3), (30, 3), (60, 6)]
)
def test_key_frames_lie_a_tenth_of_a_second_apart(fps: float, apart: int) -> None:
    key, found = Key(torch.zeros(1, 8, 8), 7.0), []
    for index in range(1, 8):
        now = 7.0 + index / fps
        if key.due(now):
            found.append(index)
            break
        key = dataclasses.replace(key, prev_s=now)
    assert found == [apart]
    assert key.due(7.0)  # a clock that stands still or runs back


def test_a_car_is_expected_to_keep_its_speed() -> None:
    before = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.03, 0.0]])
    key = Key(torch.zeros(1, 8, 8), 1.0, interval_s=0.1)
    for now, share in ((1.1, 1.0), (1.09, 1.0), (1.0333, 0.333), (1.2, 2.0), (1.3, 3.0), (9.0, 1.0), (0.5, 1.0)):
        torch.testing.assert_close(key.expected(before, now), share * before, rtol=1e-3, atol=0)
    between = dataclasses.replace(key, prev_s=1.02)
    torch.testing.assert_close(between.expected(before, 1.04), 0.4 * before)
    first = Key(torch.zeros(1, 8, 8), 1.0)
    assert first.expected(before, 1.03).equal(before)  # nothing is known of time


@pytest.mark.parametrize("covered", [1, 3])
def test_frames_that_tell_nothing_are_bridged(covered: int) -> None:
    """In a bend: what was guessed meanwhile is made good by the next frame, measured from the last good one."""
    sequence = WorldSequence(5_200_003, frames=14, camera=Camera(363.6, 363.6, 309.5, 93.5, 192, 624))
    frames, bad = list(sequence), range(8, 8 + covered)
    odometer, spoilt = (VisualOdometry.from_checkpoint(camera=sequence.camera) for _ in range(2))
    for frame in frames:
        expected = odometer.track(frame)
        black = dataclasses.replace(frame, image=np.zeros_like(frame.image))
        found = spoilt.track(black if frame.index in bad else frame)
        assert found.status == ("lost" if bad[0] <= frame.index <= bad[-1] + 1 else "ok")
        if frame.index not in bad:
            off = se3.inverse(expected.T_world_camera) @ found.T_world_camera
            assert np.linalg.norm(off[:3, 3]) < 0.01 + 0.01 * frame.index
            assert se3.rotation_angle(off[None, :3, :3])[0] < np.radians(0.1)
        if frame.index == bad[-1] + 1:
            assert np.trace(found.covariance) > 2 * np.trace(expected.covariance)


def test_a_video_of_thirty_frames_a_second_drifts_as_one_of_ten() -> None:
    """Each motion has an error of its own; measured from key frames, that of a tenth of a second is not three."""
    sequence = WorldSequence(5_200_000, frames=31, fps=30.0, camera=Camera(363.6, 363.6, 309.5, 93.5, 192, 624))
    truth, frames = sequence.trajectory.from_first_pose().T_world_camera, list(sequence)

    def track(step: int) -> list[TrackedFrame]:
        odometer = VisualOdometry.from_checkpoint(camera=sequence.camera)
        return [odometer.track(frame) for frame in frames[::step]]

    tracked, fewer = track(1), track(3)
    chained = list(itertools.accumulate((t.T_prev_curr for t in tracked), np.matmul))
    np.testing.assert_allclose(chained[-1], tracked[-1].T_world_camera, atol=1e-9)
    assert all(t.covariance is not None and np.linalg.eigvalsh(t.covariance)[0] > 0 for t in tracked[1:])
    for found, expected in zip(tracked[::3], fewer, strict=True):
        np.testing.assert_allclose(found.T_world_camera, expected.T_world_camera, atol=0.01)
    way = float(np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1).sum())
    for found, true in zip(tracked, truth, strict=True):  # between key frames too
        assert np.linalg.norm((se3.inverse(found.T_world_camera) @ true)[:3, 3]) < 0.02 * way
