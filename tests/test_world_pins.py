"""The same seed gives the same poses bit for bit, and the same frames to within one grey level, on any machine.

`python tests/test_world_pins.py` writes the pins anew: only when streets are meant to change, since drives that
others have made from seeds change with them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo.world import KITTI_CAMERA, WorldSequence

PINS = Path(__file__).with_name("test_world_pins.json")
PICTURE = Path(__file__).with_name("test_world_pins.png")
CAMERA = KITTI_CAMERA.resized(height=94, width=310)
KINDS = ("town", "country", "motorway")
FRAME = 7


def drive(kind: str) -> WorldSequence:
    return WorldSequence(42, frames=40, kind=kind, camera=CAMERA)  # type: ignore[arg-type]


def digest(world: WorldSequence) -> str:
    """A hash of all bits of the poses of the camera and of everybody else."""
    parts = (world.drive.T_street_camera, world.drive.T_street_mover, world.trajectory.T_world_camera)
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(part + 0.0).astype("<f8").tobytes() for part in parts)
    ).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_poses_are_the_same_bit_for_bit(kind: str) -> None:
    assert digest(drive(kind)) == json.loads(PINS.read_text())[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_same_to_one_grey_level(kind: str) -> None:
    row = KINDS.index(kind)
    pinned = cv2.imread(str(PICTURE), cv2.IMREAD_UNCHANGED)[row * 94 : (row + 1) * 94]
    difference = np.abs(drive(kind)[FRAME].image.astype(int) - pinned)
    assert difference.max() <= 1


if __name__ == "__main__":
    PINS.write_text(json.dumps({kind: digest(drive(kind)) for kind in KINDS}, indent=2) + "\n")
    cv2.imwrite(str(PICTURE), np.vstack([drive(kind)[FRAME].image for kind in KINDS]))
