"""Endless sequences: fresh for every epoch, the same again from the same number."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training.cache import CacheError, decode_sequence
from convlstm_vo.training.stream import SequenceStream
from tests.trees import write_tree

SIZE = {"height": 24, "width": 80, "channels": 1}
STREAM = {**SIZE, "frames": 5, "workers": 1}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for number in range(6):
        write_tree(root, {f"{number:02d}": 5}, seed=number)
    return root


def make(root: Path, number: int) -> KittiSequence:
    return KittiSequence(root, f"{number:02d}")


def test_epochs_are_fresh_and_repeatable(tree: Path) -> None:
    stream = SequenceStream(functools.partial(make, tree), 2, **STREAM)
    try:
        epochs = [stream(epoch) for epoch in (0, 1, 0)]
    finally:
        stream.close()
    assert [[s.name for s in epoch] for epoch in epochs] == [["00", "01"], ["02", "03"], ["00", "01"]]
    expected = decode_sequence(KittiSequence(tree, "03"), **SIZE)
    np.testing.assert_array_equal(epochs[1][1].images, expected.images)
    np.testing.assert_array_equal(epochs[1][1].T_world_camera, expected.T_world_camera)


def test_an_error_in_another_process_arrives_whole(tree: Path) -> None:
    (tree / "poses" / "04.txt").unlink()
    stream = SequenceStream(functools.partial(make, tree), 4, **STREAM)
    try:
        stream._begin(1)
        with pytest.raises(CacheError, match="sequence 04: has no ground-truth poses"):
            stream(1)
    finally:
        stream.close()
