"""Measure how much faster a sweep of 12 small runs is with two joblib workers than one after the other.

python scripts/launcher_speed.py                   # digits, a perceptron, 200 epochs each
python scripts/launcher_speed.py --runs lenet      # MNIST, LeNet-5, one epoch of 20 000 images each

Each sweep is the whole command, imports included, with the threads that it takes by itself, in a folder of its own. The
two take turns, so that a machine that grows slower or faster meanwhile does so for both. The data must be in the cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = "seed=" + ",".join(map(str, range(12)))
RUNS = {
    "mlp": ["data=digits", "model=mlp", "epochs=200", "batch_size=64"],
    "lenet": ["data=mnist", "model=lenet", "epochs=1", "data.train_samples=20000"],
}
LAUNCHERS = {"serial": [], "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]}


def sweep_seconds(launcher: str, arguments: list[str]) -> float:
    """Return the wall time of one sweep in seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "study=speed"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "loss=dr_softmax", SEEDS, *arguments, *LAUNCHERS[launcher]],
            env={**environment, "DRS_RESULTS": results}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"error: the sweep failed: {done.stderr.strip()}")
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", choices=list(RUNS), default="mlp", help="what is trained 12 times")
    parser.add_argument("--pairs", type=int, default=2, help="how often each sweep is run")
    options = parser.parse_args()
    arguments = RUNS[options.runs]
    ratios = []
    for pair in range(options.pairs):
        # Neither is always the first.
        order = list(LAUNCHERS) if pair % 2 == 0 else list(reversed(LAUNCHERS))
        seconds = {launcher: sweep_seconds(launcher, arguments) for launcher in order}
        ratios.append(seconds["serial"] / seconds["joblib"])
        print(f"serial {seconds['serial']:.1f} s, joblib {seconds['joblib']:.1f} s: x {ratios[-1]:.2f}", flush=True)
    print(
        f"12 runs ({' '.join(arguments)}): two workers are {statistics.median(ratios):.2f} "
        f"times as fast as one ({', '.join(f'{ratio:.2f}' for ratio in ratios)}; {os.cpu_count()} cores)"
    )


if __name__ == "__main__":
    main()
