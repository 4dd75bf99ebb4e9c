"""The road goes out of sight: unseen streets and clips of KITTI, all under the horizon hidden after 1.5 s.

    python benchmarks/no_road.py --json OUT.json

From then on nothing says how long a way is but what stands beside the road and the frames before: *carried* as the
odometer does it, with the depth that it carries along; *forgotten* without it, from the speed that it had. The
error is that of the whole way after that, % of it; *over sd* that of each frame's way over its standard deviation.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from zero_shot import CLIPS, FIRST_SEED, unseen_streets

from convlstm_vo.evaluation.evaluate import save_json
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import Cells, GeometricNet, View
from convlstm_vo.models.mounting import Memory
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.sequences.kitti import KittiSequence

HIDDEN_FROM, UNDER_HORIZON_PX = 15, 12


class Forgetful(GeometricNet):
    """What the frames before have told of depths is not asked."""

    def look(self, view: View, memory: Memory) -> Cells:
        return super().look(dataclasses.replace(view, depth=None), memory)


def errors(net: GeometricNet, sequence: Sequence) -> tuple[float, float, float, float]:
    """Of the way without a road, %: of all of it, of its first and of its last second; and over its standard
    deviation (rms of all frames)."""
    truth, camera = sequence.trajectory, sequence.camera
    assert truth is not None
    odometer, found, sds = VisualOdometry(net, camera), [], []
    for index in range(len(sequence)):
        if index == HIDDEN_FROM:
            mask = np.full((camera.height, camera.width), 255, np.uint8)
            mask[round(camera.cy) + UNDER_HORIZON_PX :] = 0
            odometer.hide(mask)
        tracked = odometer.track(sequence[index])
        step = tracked.T_prev_curr[:3, 3]
        found.append(float(np.linalg.norm(step)))
        covariance = np.eye(6) if tracked.covariance is None else tracked.covariance
        sds.append(float(np.sqrt(step @ covariance[:3, :3] @ step)) / max(found[-1], 1e-9))
        assert index < HIDDEN_FROM or not tracked.metric, "a road is seen that is hidden"
    ways = np.array(found[HIDDEN_FROM:])
    true = np.linalg.norm(truth.motions[HIDDEN_FROM - 1 :, :3], axis=1)
    off = [100 * (ways[part].sum() / true[part].sum() - 1) for part in (slice(None), slice(10), slice(-10, None))]
    over_sd = (ways - true) / np.array(sds[HIDDEN_FROM:])
    return off[0], off[1], off[2], float(np.sqrt(np.mean(over_sd**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--streets", type=int, default=12)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    carried = load_checkpoint()
    assert isinstance(carried, GeometricNet)
    forgotten = Forgetful(carried.config)
    forgotten.load_state_dict(carried.state_dict())
    sequences = unseen_streets(options.streets, options.frames, seed=FIRST_SEED)
    if options.kitti.is_dir():
        sequences += [KittiSequence(options.kitti, name) for name in CLIPS]
    rows: dict[str, dict[str, tuple[float, ...]]] = {"carried": {}, "forgotten": {}}
    with progress("Without a road", 2 * len(sequences)) as advance:
        for sequence in sequences:
            for name, net in (("carried", carried), ("forgotten", forgotten)):
                rows[name][sequence.name] = errors(net.requires_grad_(False), sequence)
                advance(1)
    columns = ("whole way", "first second", "last second", "over sd")
    print(f"{'% off':12s}" + "".join(f"{column:>22s}" for column in columns))
    for name, row in rows.items():
        streets = np.abs([off for key, off in row.items() if key not in CLIPS])
        cells = [f"{m:.1f} ({n:.1f})" for m, n in zip(streets.mean(0), np.median(streets, 0), strict=True)]
        print(f"{name:12s}" + "".join(f"{cell:>22s}" for cell in cells))
        print(f"{'':12s}mean (median) of {len(streets)} streets")
        clips = (f"{key} {row[key][0]:+.1f}" for key in CLIPS if key in row)
        print(f"{'':12s}KITTI, whole way %: " + ", ".join(clips), flush=True)
    if options.json:
        save_json(options.json, rows)


if __name__ == "__main__":
    main()
