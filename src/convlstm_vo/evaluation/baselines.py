"""What anybody can predict without looking at a single frame; a result means little unless it beats these.

Each takes the ground truth, of which it uses at most a mean, and keeps its times and its first pose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.trajectory import Trajectory


def zero_motion(ground_truth: Trajectory) -> Trajectory:
    """The camera never moves."""
    return _repeat(ground_truth, np.zeros(6))


def constant_motion(ground_truth: Trajectory) -> Trajectory:
    """The mean true motion, translation and rotation vector, over and over: a circle."""
    return _repeat(ground_truth, ground_truth.motions.mean(axis=0))


def straight_ahead(ground_truth: Trajectory) -> Trajectory:
    """Straight along the first optical axis at the true mean speed, without rotation."""
    step_m = ground_truth.distances_m[-1] / (len(ground_truth) - 1)
    return _repeat(ground_truth, np.array([0, 0, step_m, 0, 0, 0]))


BASELINES: dict[str, Callable[[Trajectory], Trajectory]] = {
    "zero_motion": zero_motion,
    "constant_motion": constant_motion,
    "straight_ahead": straight_ahead,
}


def _repeat(ground_truth: Trajectory, motion: NDArray[np.float64]) -> Trajectory:
    """The path of one motion 6-vector repeated from the first true pose: as many poses as the ground truth."""
    motions = np.tile(motion, (len(ground_truth) - 1, 1))
    path = Trajectory.from_motions(motions, ground_truth.timestamps_s)
    poses = ground_truth.T_world_camera[0] @ path.T_world_camera
    return dataclasses.replace(path, T_world_camera=poses, frames=ground_truth.frames)
