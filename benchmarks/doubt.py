"""Does the default network know when it does not know the length of the way? Flags and covariance against truth.

python benchmarks/doubt.py --json doubt.json
python benchmarks/doubt.py --road-error 0 --json before.json   # the covariance without the road's part

Frames from which a turn in a town begins (60 streets, 7 motions each), 12 other unseen streets of all kinds (59
motions each), and KITTI's clips. *Wrong*: motions whose length is off by more than a tenth (where the car moves by
more than 15 cm); *told*: of these, said to be without metric scale; *doubted*: of those within 3 % or 1.5 cm. *z*:
error of the length over its own standard deviation; 1 is calibrated. Lost ones are counted apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from hard_cases import CAMERA, FIRST_SEED, Film, covered, show, whole
from zero_shot import CLIPS, ROADS
from zero_shot import FIRST_SEED as FIRST_STREET

from convlstm_vo.geometry import se3
from convlstm_vo.models import geometric
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, Network, load_checkpoint
from convlstm_vo.odometer import TrackedFrame, VisualOdometry
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import WorldSequence

Row = tuple[float, float, float, bool]  # true length, error, standard deviation in metres; whether it was doubted


def row(true: np.ndarray, tracked: TrackedFrame) -> Row | None:
    """Of one motion; None where it has no covariance or is lost."""
    if tracked.covariance is None or tracked.status == "lost":
        return None
    t = tracked.T_prev_curr[:3, 3]
    ahead = t / max(float(np.linalg.norm(t)), 1e-9)
    sd = float(np.sqrt(ahead @ tracked.covariance[:3, :3] @ ahead))
    length = float(np.linalg.norm(true[:3, 3]))
    return length, abs(float(np.linalg.norm(t)) - length), sd, not tracked.metric


def of_film(net: Network, film: Film) -> list[Row | None]:
    """All motions of a film."""
    truth = [film.truth(k) for k in range(1, len(film.shots))]
    return [row(true, t) for true, t in zip(truth, show(net, film)[1:], strict=True) if true is not None]


def of_clip(net: Network, clip: KittiSequence) -> list[Row | None]:
    """All motions of a clip of KITTI's."""
    assert clip.trajectory is not None
    poses = clip.trajectory.T_world_camera
    tracked = list(VisualOdometry(net, clip.camera).stream(clip))
    return [row(se3.relative(poses[k - 1], poses[k]), tracked[k]) for k in range(1, len(tracked))]


def summary(rows: list[Row | None]) -> dict[str, float]:
    """The figures of the head of this file."""
    length, error, sd, doubted = (np.array(v) for v in zip(*(r for r in rows if r is not None), strict=True))
    wrong = (error > 0.1 * length) & (length > 0.15)
    good = (error < 0.03 * length) | (error < 0.015)
    z = error / sd
    return {
        "motions": len(rows),
        "lost": sum(r is None for r in rows),
        "wrong": int(wrong.sum()),
        "told": int((wrong & doubted).sum()),
        "good": int(good.sum()),
        "doubted": int((good & doubted).sum()),
        "z_rms": float(np.sqrt((z**2).mean())),
        "z_99_percent": float(np.quantile(z, 0.99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--road-error", type=float, default=geometric._ROAD_ERROR)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net, geometric._ROAD_ERROR = load_checkpoint(options.checkpoint), options.road_error
    turns = [covered(seed, 3).until(8) for seed in range(FIRST_SEED + 1, FIRST_SEED + 61)]
    streets = [
        WorldSequence(FIRST_STREET + n, frames=60, kind=ROADS[n % 3], camera=CAMERA)  # type: ignore[arg-type]
        for n in range(12)
    ]
    results = {}
    for name, films in (("turns", turns), ("streets", [Film(whole(street)) for street in streets])):
        results[name] = summary([r for film in films for r in of_film(net, film)])
    if options.kitti.is_dir():
        results |= {name: summary(of_clip(net, KittiSequence(options.kitti, name))) for name in CLIPS}
    for name, figures in results.items():
        print(f"{name:8}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
