"""A camera's path: time stamps, poses ``T_world_camera``; KITTI and TUM files; alignment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.files import write_atomically

Alignment = Literal["none", "scale", "se3", "sim3"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
FRAME_PERIOD_S = 0.1  # KITTI's camera, where a file carries no time
_FARTHEST_M = 1e9  # beyond which no vehicle goes
_ROTATION_TOLERANCE = 1e-3  # KITTI's own files have 7 digits; real estimates come in float32


class TrajectoryError(ConvlstmVoError):
    """A trajectory file or array that cannot be read as poses."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Poses of one camera over time.

    Attributes:
        timestamps_s: (N,) float64 seconds, strictly increasing.
        T_world_camera: (N, 4, 4) float64; each maps points of the camera frame into the world frame, in metres.
        frames: (N,) frame numbers in the source, or None when the rows are all of its frames in order.

    Raises:
        TrajectoryError: shapes that differ, numbers that are not finite, or times that do not increase.
    """

    timestamps_s: NDArray[np.float64]
    T_world_camera: NDArray[np.float64]
    frames: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.timestamps_s)
        if self.T_world_camera.shape != (n, 4, 4):
            raise TrajectoryError(
                f"{n} time stamps need poses of shape ({n}, 4, 4), not {self.T_world_camera.shape}"
            )
        if self.frames is not None and self.frames.shape != (n,):
            raise TrajectoryError(f"{n} time stamps need {n} frame numbers, not {self.frames.shape}")
        if not (np.isfinite(self.T_world_camera).all() and np.isfinite(self.timestamps_s).all()):
            raise TrajectoryError("poses or time stamps contain NaN or infinity")
        if n and (farthest := np.abs(self.T_world_camera[:, :3, 3]).max()) > _FARTHEST_M:
            raise TrajectoryError(f"a position is {farthest:g} m from the origin, farther than a vehicle goes")
        if n > 1 and not (np.diff(self.timestamps_s) > 0).all():
            row = int(np.argmin(np.diff(self.timestamps_s) > 0)) + 1
            raise TrajectoryError(f"time stamps must increase, but number {row} does not (counted from 0)")

    @classmethod
    def from_motions(
        cls, motions: NDArray[np.floating], timestamps_s: NDArray[np.float64] | None = None
    ) -> Trajectory:
        """Chain N-1 motions (N-1, 6) of ``T_prev_curr`` into N poses, the first of them the identity."""
        poses = [np.eye(4)]
        for step in se3.matrix_from_motion(np.asarray(motions, dtype=np.float64)):
            poses.append(poses[-1] @ step)
        times = _regular_times(len(poses)) if timestamps_s is None else timestamps_s
        return cls(times, np.stack(poses))

    def __len__(self) -> int:
        return len(self.timestamps_s)

    @property
    def positions_xyz(self) -> NDArray[np.float64]:
        """Camera centres in the world, metres: (N, 3)."""
        return self.T_world_camera[:, :3, 3]

    @property
    def motions(self) -> NDArray[np.float64]:
        """Motions ``T_prev_curr`` between consecutive poses, as 6-vectors: (N-1, 6)."""
        return se3.motion_from_matrix(se3.relative(self.T_world_camera[:-1], self.T_world_camera[1:]))

    @property
    def distances_m(self) -> NDArray[np.float64]:
        """Path length from the first pose to each pose, metres: (N,)."""
        steps = np.linalg.norm(np.diff(self.positions_xyz, axis=0), axis=1)
        return np.concatenate([[0.0], np.cumsum(steps)])

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Trajectory:
        """The trajectory of the given rows."""
        frames = None if self.frames is None else self.frames[rows]
        return Trajectory(self.timestamps_s[rows], self.T_world_camera[rows], frames)

    def with_extrinsics(self, T_camera_other: NDArray[np.float64]) -> Trajectory:
        """The path of another camera fixed to this one, whose pose in it is ``T_camera_other``.

        The world frame moves with it, so a path that starts at the identity still does (KITTI's convention).
        """
        poses = se3.inverse(T_camera_other) @ self.T_world_camera @ T_camera_other
        return dataclasses.replace(self, T_world_camera=poses)

    def from_first_pose(self) -> Trajectory:
        """The same path in the frame of its first pose, which becomes the identity."""
        return dataclasses.replace(self, T_world_camera=se3.inverse(self.T_world_camera[0]) @ self.T_world_camera)

    def align(self, reference: Trajectory, alignment: Alignment) -> Trajectory:
        """Move this trajectory onto ``reference`` (same length, matched row by row) in the least-squares sense.

        ``none`` changes nothing; ``scale`` multiplies positions by the scale of the similarity fit only (as evo's
        ``--correct_scale`` alone); ``se3`` rotates and translates; ``sim3`` also scales (Umeyama 1991).

        Raises:
            TrajectoryError: different lengths, or points that fix no alignment (all of them equal).
        """
        if alignment == "none":
            return self
        scale, rotation, translation = umeyama(
            self.positions_xyz, reference.positions_xyz, with_scale=alignment in ("scale", "sim3")
        )
        poses = self.T_world_camera.copy()
        poses[:, :3, 3] *= scale
        if alignment != "scale":
            transform = np.eye(4)
            transform[:3, :3], transform[:3, 3] = rotation, translation
            poses = transform @ poses
        return dataclasses.replace(self, T_world_camera=poses)

    def write_kitti(self, path: Path | str) -> None:
        """Write one row of 12 numbers a pose (the top three rows of ``T_world_camera``), every digit kept."""
        write_atomically(Path(path), "".join(kitti_row(pose) for pose in self.T_world_camera))

    def write_tum(self, path: Path | str) -> None:
        """Write ``time x y z qx qy qz qw`` a pose, every digit kept (times in seconds)."""
        rows = (tum_row(*row) for row in zip(self.timestamps_s, self.T_world_camera, strict=True))
        write_atomically(Path(path), "".join(rows))


def kitti_row(T_world_camera: NDArray[np.float64]) -> str:
    """One line of a KITTI pose file, with the shortest decimals that read back to the same float64."""
    return " ".join(repr(float(value)) for value in T_world_camera[:3].reshape(-1)) + "\n"


def tum_row(timestamp_s: float, T_world_camera: NDArray[np.float64]) -> str:
    """One line of a TUM trajectory file: time, position, quaternion (x, y, z, w)."""
    quat_xyzw = Rotation.from_matrix(T_world_camera[:3, :3]).as_quat(canonical=True)
    numbers = [timestamp_s, *T_world_camera[:3, 3], *quat_xyzw]
    return " ".join(repr(float(value)) for value in numbers) + "\n"


def umeyama(
    source_xyz: NDArray[np.float64], target_xyz: NDArray[np.float64], *, with_scale: bool
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Scale, rotation and translation that bring ``source`` (N, 3) closest to ``target`` (N, 3).

    Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991.
    """
    if source_xyz.shape != target_xyz.shape:
        raise TrajectoryError(f"cannot align {len(source_xyz)} poses with {len(target_xyz)}: match them first")
    source_mean, target_mean = source_xyz.mean(axis=0), target_xyz.mean(axis=0)
    source, target = source_xyz - source_mean, target_xyz - target_mean
    variance = (source**2).sum() / len(source)
    extent = max(1.0, np.abs(source_mean).max())
    if variance <= (1e-12 * extent) ** 2:  # the mean of equal numbers may be off by a rounding
        raise TrajectoryError("cannot align a trajectory that stands still: all its positions are equal")
    u, singular, vt = np.linalg.svd(target.T @ source / len(source))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((singular * sign).sum() / variance) if with_scale else 1.0
    return scale, rotation, target_mean - scale * rotation @ source_mean


def read_kitti(path: Path | str, timestamps_s: NDArray[np.float64] | None = None) -> Trajectory:
    """Read a KITTI pose file: rows of 12 numbers, or 13 with a frame number in front.

    Args:
        path: the file.
        timestamps_s: times of all frames of the sequence; without them, 10 Hz.

    Raises:
        TrajectoryError: with file, line and rule, where a row has another number of values, a value is not a
            finite number, or its 3x3 part is not a rotation.
    """
    path = Path(path)
    rows = _read_rows(path, lambda n: n in (12, 13), "12 numbers (or 13 with a frame number in front)")
    frames = rows[:, 0].astype(np.int64) if rows.shape[1] == 13 else None
    if frames is not None and (bad := (frames != rows[:, 0]) | (frames < 0)).any():
        row = int(np.argmax(bad))
        raise TrajectoryError(f"{path}, pose {row + 1}: {rows[row, 0]:g} is no frame number; they count from 0")
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = rows[:, -12:].reshape(-1, 3, 4)
    _check_rotations(path, poses)
    index = np.arange(len(rows)) if frames is None else frames
    if timestamps_s is None:
        return _checked(path, index * FRAME_PERIOD_S, poses, frames)
    if index[-1] >= len(timestamps_s) or (frames is None and len(rows) != len(timestamps_s)):
        raise TrajectoryError(f"{path}: {len(rows)} poses do not fit {len(timestamps_s)} time stamps")
    return _checked(path, timestamps_s[index], poses, frames)


def read_tum(path: Path | str) -> Trajectory:
    """Read a TUM trajectory: ``time x y z qx qy qz qw`` a row, or 7 numbers without the time (then 10 Hz).

    Raises:
        TrajectoryError: with file, line and rule, where a row cannot be read or a quaternion is zero.
    """
    path = Path(path)
    rows = _read_rows(path, lambda n: n in (7, 8), "8 numbers: time x y z qx qy qz qw")
    quat_xyzw = rows[:, -4:]
    norms = np.linalg.norm(quat_xyzw, axis=1)
    if (norms < 0.5).any():
        raise TrajectoryError(f"{path}, pose {int(np.argmin(norms)) + 1}: the quaternion must have length 1")
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(quat_xyzw).as_matrix()
    poses[:, :3, 3] = rows[:, -7:-4]
    times = rows[:, 0] if rows.shape[1] == 8 else _regular_times(len(rows))
    return _checked(path, times, poses, None)


def read_trajectory(path: Path | str) -> Trajectory:
    """Read a KITTI or TUM trajectory; the number of columns tells which (12, 13: KITTI; 7, 8: TUM)."""
    for number, values in _lines(Path(path)):
        if len(values) in (12, 13):
            return read_kitti(path)
        if len(values) in (7, 8):
            return read_tum(path)
        raise TrajectoryError(
            f"{path}, line {number}: {len(values)} values, where a row of KITTI has 12 (or 13) and one of "
            "TUM 8 (or 7) numbers, between spaces or commas"
        )
    raise TrajectoryError(f"{path}: the file holds no poses")


def has_own_times(path: Path | str) -> bool:
    """Whether a trajectory file carries time stamps (TUM with 8 columns)."""
    return any(len(values) == 8 for _, values in _lines(Path(path)))


def read_times(path: Path | str) -> NDArray[np.float64]:
    """Read a ``times.txt``: one time in seconds a row, each later than the one before: (N,).

    Raises:
        TrajectoryError: with file and row.
    """
    times = _read_rows(Path(path), lambda n: n == 1, "1 number: the time in seconds")[:, 0]
    if (early := np.diff(times) <= 0).any():
        row = int(np.argmax(early)) + 1
        raise TrajectoryError(
            f"{path}, row {row + 1}: {times[row]:g} s does not follow {times[row - 1]:g} s; times must increase"
        )
    return times


def _regular_times(count: int) -> NDArray[np.float64]:
    return np.arange(count, dtype=np.float64) * FRAME_PERIOD_S


def _checked(path: Path, times: NDArray, poses: NDArray, frames: NDArray | None) -> Trajectory:
    """A trajectory whose errors name the file."""
    try:
        return Trajectory(times, poses, frames)
    except TrajectoryError as error:
        raise TrajectoryError(f"{path}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers (from 1) and fields of the lines that are neither empty nor comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark in front
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrajectoryError(f"{path}: cannot be read as text ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.replace(",", " ").split()
        if fields and not fields[0].startswith("#"):
            yield number, fields


def _read_rows(path: Path, fits: Callable[[int], bool], rule: str) -> NDArray[np.float64]:
    """All rows of numbers of a file: (rows, columns), every row of the same allowed width."""
    rows: list[list[float]] = []
    for number, fields in _lines(path):
        if not fits(len(fields)) or (rows and len(fields) != len(rows[0])):
            raise TrajectoryError(f"{path}, line {number}: {len(fields)} values, where a row needs {rule}")
        rows.append([_finite(path, number, field) for field in fields])
    if not rows:
        raise TrajectoryError(f"{path}: the file is empty; a row needs {rule}")
    return np.array(rows)


def _finite(path: Path, line: int, field: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TrajectoryError(f"{path}, line {line}: {field!r} is not a finite number")
    return value


def _check_rotations(path: Path, poses: NDArray[np.float64]) -> None:
    rotations = poses[:, :3, :3]
    residual = np.abs(rotations @ rotations.swapaxes(-1, -2) - np.eye(3)).max(axis=(1, 2))
    bad = (residual > _ROTATION_TOLERANCE) | (np.linalg.det(rotations) < 0)
    if bad.any():
        row = int(np.argmax(bad))
        what = f"off by {residual[row]:.2g}" if residual[row] > _ROTATION_TOLERANCE else "it is mirrored"
        raise TrajectoryError(
            f"{path}, pose {row + 1}: its 3x3 part is not a rotation ({what}); "
            "a row is the top three rows of T_world_camera, row by row"
        )
