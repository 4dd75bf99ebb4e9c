"""The benchmarks in turn, as `make bench` runs them; each prints its own figures and writes JSON to runs/bench.

Not among them: ablation.py and recurrence.py, which take hours; weights_pace.py, which needs what a training left;
and training_curves.py, which measures nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NOT_RUN = {Path(__file__).name, "ablation.py", "recurrence.py", "training_curves.py", "weights_pace.py"}


def main() -> None:
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.name not in NOT_RUN)
    failed = []
    for script in scripts:
        print(f"\n=== {script.name}", flush=True)
        command = [sys.executable, str(script), "--json", str(out / f"{script.stem}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(script.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
