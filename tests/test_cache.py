"""Decoded frames: once, rebuilt when the source changes, and nothing half-written."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.sequences.base import SequenceError, fit_image
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training import cache
from convlstm_vo.training.cache import CacheError, decode_sequence
from tests.trees import write_tree

SIZE = {"height": 24, "width": 80, "channels": 1}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", {"00": 6})


def test_frames_are_those_of_the_sequence(tree: Path, tmp_path: Path) -> None:
    sequence = KittiSequence(tree, "00")
    for folder in (None, tmp_path / "cache"):
        decoded = decode_sequence(sequence, **SIZE, folder=folder)
        for frame in sequence:
            np.testing.assert_array_equal(decoded.images[frame.index], fit_image(frame.image, **SIZE))
        np.testing.assert_allclose(decoded.intrinsics, sequence.camera.resized(height=24, width=80).intrinsics)


def test_gray_frames_take_one_channel_even_for_colour_networks(tree: Path) -> None:
    decoded = decode_sequence(KittiSequence(tree, "00"), height=24, width=80, channels=3)
    assert decoded.images.shape == (6, 24, 80, 1)


def test_a_second_run_decodes_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = KittiSequence(tree, "00")
    first = decode_sequence(sequence, **SIZE, folder=tmp_path / "cache")
    monkeypatch.setattr(cache, "fit_image", lambda *args, **kwargs: pytest.fail("decoded again"))
    done: list[int] = []
    second = decode_sequence(sequence, **SIZE, folder=tmp_path / "cache", advance=done.append)
    np.testing.assert_array_equal(first.images, second.images)
    assert sum(done) == 6


def test_a_changed_image_is_decoded_again(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=folder)
    path = tree / "sequences" / "00" / "image_0" / "000003.png"
    cv2.imwrite(str(path), np.full((48, 160), 77, np.uint8))
    os.utime(path, ns=(1, 1))
    assert (decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=folder).images[3] == 77).all()


def test_two_runs_may_build_at_once(tree: Path, tmp_path: Path) -> None:
    results: list[np.ndarray] = []

    def build() -> None:
        results.append(
            np.array(decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=tmp_path / "cache").images)
        )

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all((result == results[0]).all() for result in results)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_truncated_image_leaves_no_cache(tree: Path, tmp_path: Path) -> None:
    path = tree / "sequences" / "00" / "image_0" / "000004.png"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SequenceError, match="000004"):
        decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_found_before_anything_is_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    with pytest.raises(ConvlstmVoError, match="No space left on device"):
        decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CacheError, match=r"is damaged .*; delete it"):
        decode_sequence(KittiSequence(tree, "00"), **SIZE, folder=tmp_path / "cache")


def test_a_sequence_without_poses_cannot_be_learnt_from(tree: Path) -> None:
    (tree / "poses" / "00.txt").unlink()
    with pytest.raises(CacheError, match="sequence 00: has no ground-truth poses"):
        decode_sequence(KittiSequence(tree, "00"), **SIZE)
