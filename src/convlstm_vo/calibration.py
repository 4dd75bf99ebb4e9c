"""What an odometer has found out about a vehicle, or was told: the camera's height and how it is mounted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.geometry.trajectory import Trajectory

_LARGEST = 1e12  # a precision beyond which nothing is known


class CalibrationError(ConvlstmVoError):
    """A calibration that no vehicle has."""


@dataclasses.dataclass(frozen=True)
class VehicleCalibration:
    """A camera on a vehicle.

    Attributes:
        camera_height_m: above the road; it gives the scale of the motion.
        pitch_rad: by which the camera looks up from the road. roll_rad: by which it leans to the right.
        yaw_rad: by which it looks to the right of where the vehicle drives.
        pitch_precision, roll_precision, yaw_precision: how well each of these is known, as an inverse variance
            (1 / rad^2); 0: not at all.
    """

    camera_height_m: float = 1.65
    pitch_rad: float = 0.0
    roll_rad: float = 0.0
    yaw_rad: float = 0.0
    pitch_precision: float = 0.0
    roll_precision: float = 0.0
    yaw_precision: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
                raise CalibrationError(f"{name} is {value!r}, but must be a finite number, {_LARGEST:g} at most")
        if not 0.1 <= self.camera_height_m <= 20:
            raise CalibrationError(
                f"camera height {self.camera_height_m} m: must lie between 0.1 and 20 m above the road; measure it "
                "from the road to the lens"
            )
        if max(abs(self.pitch_rad), abs(self.roll_rad), abs(self.yaw_rad)) > 0.3:
            raise CalibrationError(
                f"pitch {self.pitch_rad} rad, roll {self.roll_rad} rad, yaw {self.yaw_rad} rad: must be under 0.3 "
                "(17 degrees); rotate the images so that the camera looks ahead"
            )
        for name in ("pitch_precision", "roll_precision", "yaw_precision"):
            if getattr(self, name) < 0:
                raise CalibrationError(f"{name} {getattr(self, name)}: must not be negative")

    def write(self, path: Path) -> None:
        """As JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> VehicleCalibration:
        """What `write` wrote.

        Raises:
            CalibrationError: a missing or damaged file, an unknown key, or an impossible value; the file is named.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{path}: cannot be read as a calibration ({error})") from None
        if not isinstance(values, dict) or (unknown := set(values) - names):
            what = ", ".join(sorted(unknown)) if isinstance(values, dict) else type(values).__name__
            raise CalibrationError(
                f"{path}: {what} is not part of a calibration; it has {', '.join(sorted(names))}; "
                "one of an earlier version is made again by `convlstm-vo calibrate`"
            )
        if "camera_height_m" not in values:
            raise CalibrationError(f"{path}: has no camera_height_m, which gives the scale; `calibrate` writes it")
        try:
            return cls(**values)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None


def true_height(assumed_m: float, driven_m: float, true_m: float | None, source: str) -> float:
    """The height of a camera that was taken to be ``assumed_m`` above the road while a way was driven.

    Args:
        driven_m, true_m: length of the way as it was found, and as it is.

    Raises:
        CalibrationError: no way, or one that would make the height wrong by more than a factor of 2.
    """
    ratio = (true_m or 0.0) / driven_m
    if not 0.5 < ratio < 2:
        raise CalibrationError(
            f"{source}: {true_m or 0:.1f} m, but with the camera {assumed_m:g} m above the road {driven_m:.1f} m "
            f"were driven, so it would be {assumed_m * ratio:.3g} m above it; check the distance and "
            "--camera-height, which must be right to a factor of 2"
        )
    return assumed_m * ratio


def check_track(track: Trajectory, timed: bool, times_s: NDArray[np.float64], source: str) -> None:
    """Whether a track may be that of these frames.

    Args:
        timed: whether it has times of its own; its clock may be another one. times_s: of the frames.

    Raises:
        CalibrationError: one that takes another time, or without times another number of poses.
    """
    if not timed and len(track) != len(times_s):
        raise CalibrationError(
            f"{source}: {len(track)} poses for {len(times_s)} frames; a track without times needs one for each "
            "(give times, in TUM's format, or its length by --distance)"
        )
    took, film = (float(t[-1] - t[0]) for t in (track.timestamps_s, times_s))
    if timed and abs(took - film) > max(1.0, 0.05 * film):
        raise CalibrationError(
            f"{source}: takes {took:.1f} s, but the frames {film:.1f} s; cut one of them, or set --fps"
        )


LEAST_TURN_RAD = 0.5  # of a drive whose turns say something about the focal length
_TURNING_RAD = 0.005  # of a frame that counts as turning


def turn_gain(true: Trajectory, found: Trajectory) -> float | None:
    """By which share a camera seems to turn more than it did, whatever the axes of its true path.

    A focal length that is given too long by a percent makes each turn too small by a percent.

    Args:
        true, found: of the same frames.

    Returns:
        None where the camera turned by less than `LEAST_TURN_RAD`.
    """
    real, seen = (np.linalg.norm(path.motions[:, 3:], axis=1) for path in (true, found))
    turning = real > _TURNING_RAD
    if real[turning].sum() < LEAST_TURN_RAD:
        return None
    return float(seen[turning] @ real[turning] / (real[turning] @ real[turning])) - 1
