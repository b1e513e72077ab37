"""Reproduce the study: fetch the data, train, attack, report, and compare with the committed reference.

    python scripts/reproduce.py [--experiment NAME]

Without a name it takes laptop on a machine without a GPU, and mnist and cifar10 on one with. Finished trainings and
attacks are kept, so that a call that was interrupted goes on where it stopped.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drs.comparison import REFERENCE, comparison_text, machine_name
from drs.config import PROJECT_ROOT, SuiteConfig, TrainConfig, evaluate_config, loss_label, loss_weight
from drs.durations import duration
from drs.entrypoint import run_script
from drs.errors import DamagedFileError, Interrupted, UserError
from drs.jobs import settled
from drs.markdown import fixed, interval
from drs.report import read_provenance
from drs.runs import run_folder, study_folder
from drs.sweeper import core_count, grid_jobs, register_plugins, threads_each, threads_text

SCRIPTS = PROJECT_ROOT / "scripts"
EFFECTS = {
    "C1": "Spearman's rho",
    "C2": "difference of accuracies",
    "C3": "ratio of step times",
    "C4": "Spearman's rho",
    "C5": "share of the gain that is left",
}
MAX_WORKERS = 4
"""How many trainings run at a time at most: on CIFAR-10 each takes 0.75 GiB, and all are to fit into 4 GiB."""
GRACE_SECONDS = 5.0
"""How long an interrupted step may take to end its own processes."""


@dataclass(frozen=True)
class Plan:
    """What an experiment will do.

    Attributes:
        experiment: Its name.
        folder: The study's folder.
        jobs: The config of every training.
        states: How many trainings are "done", "diverged", "running", "failed" or, without a run yet, "new".
        suite: The attacks, their epsilons and samples.
    """

    experiment: str
    folder: Path
    jobs: list[TrainConfig]
    states: Counter[str]
    suite: SuiteConfig

    @property
    def data(self) -> list[str]:
        """The data sets, in the order in which they are trained on."""
        return list(dict.fromkeys(job.data.name for job in self.jobs))

    @property
    def n_left(self) -> int:
        """How many trainings have no result yet; a diverged one has, and is not tried again."""
        return len(self.jobs) - self.states["done"] - self.states["diverged"]


def main() -> int:
    """Run the pipeline; return 0, or the exit status of the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", metavar="NAME", help="one file of configs/experiment, such as smoke")
    chosen = parser.parse_args().experiment
    started = time.monotonic()

    plans = [make_plan(name) for name in ([chosen] if chosen else default_experiments())]
    for plan in plans:
        show(plan_text(plan, REFERENCE, terminal_width(), training_workers(plan)))
    run_step("fetch_data.py", *dict.fromkeys(name for plan in plans for name in plan.data))
    for plan in plans:
        if plan.n_left:
            run_step("train.py", *training_arguments(plan, training_workers(plan)))
        run_step("evaluate.py", f"experiment={plan.experiment}")
    for plan in plans:
        show(claims_text(plan.folder, width=terminal_width()))
        show(wrapped(comparison_text(plan.folder), terminal_width()))
        show(outputs_text(plan.folder))
    show(f"Total time: {duration(time.monotonic() - started)}")
    return 0


def default_experiments() -> list[str]:
    """Return the experiments for this machine."""
    return ["mnist", "cifar10"] if torch.cuda.is_available() else ["laptop"]


def make_plan(experiment: str) -> Plan:
    """Read an experiment's configs and the state of its runs; nothing is written.

    Raises:
        UserError: For an unknown experiment or a config that does not fit the schema.
    """
    jobs = [config for _, config in grid_jobs(experiment)]
    states = Counter(_state(job) for job in jobs)
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        suite = evaluate_config(compose("evaluate", [f"experiment={experiment}"])).suite
    return Plan(experiment, study_folder(jobs[0].results_dir, jobs[0].study), jobs, states, suite)


def _state(job: TrainConfig) -> str:
    result = settled(job)
    if result is not None:
        return "diverged" if result.state == "diverged" else "done"
    try:
        state = str(run_folder(job).status().get("state", "new"))
    except DamagedFileError:
        return "damaged"
    # A run that says that it is done, and still is not settled, lacks something of what it vouches for.
    return "damaged" if state == "done" else state


def training_workers(plan: Plan) -> int:
    """Return how many of a plan's trainings run at a time: one on a GPU, else one for each core, up to a limit.

    Two small networks on a thread each train faster than one after the other on two, which wait for each other.
    """
    return 1 if torch.cuda.is_available() else max(1, min(core_count(), MAX_WORKERS, len(plan.jobs)))


def training_arguments(plan: Plan, workers: int) -> list[str]:
    """Return what the training step is called with."""
    parallel = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"] if workers > 1 else []
    return [f"experiment={plan.experiment}", *parallel]


def plan_text(plan: Plan, reference_root: Path, width: int, workers: int = 1) -> str:
    """Tell what will be trained and attacked, what is done already, and how long it took elsewhere."""
    lines = [f"Experiment {plan.experiment}, into {plan.folder}"]
    for (data, model), group in groupby(plan.jobs, key=lambda job: (job.data.name, job.model.name)):
        lines += _training_lines(f"{data}/{model}", list(group))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(plan.states.items()) if state != "new")
    lines.append(f"  trainings: {len(plan.jobs)}, of which {plan.n_left} are left" + (f" ({counts})" if counts else ""))
    if workers > 1:
        lines.append(f"  trainings run {workers} at a time, {threads_text(threads_each(workers))}")
    attacks = ", ".join(_attack_label(plan.suite, name) for name in plan.suite.attacks)
    lines.append(f"  attacks ({plan.suite.name} suite): {attacks}")
    for data in plan.data:
        norms = plan.suite.epsilons.get(data, {})
        bounds = "; ".join(f"{norm} {', '.join(map(str, epsilons))}" for norm, epsilons in norms.items())
        samples = plan.suite.n_samples.get(data, plan.suite.n_samples["default"])
        lines.append(f"    {data}: {samples} test images; epsilons {bounds}")
    lines.append(f"  {_expected_time(reference_root / plan.folder.name)}")
    return wrapped("\n".join(lines), width)


def _training_lines(name: str, jobs: list[TrainConfig]) -> list[str]:
    """Write losses x weights x seeds, a line for each loss and procedure."""
    lines = []
    for loss, group in groupby(jobs, key=loss_label):
        same = list(group)
        weights = list(dict.fromkeys(loss_weight(job.loss) for job in same))
        seeds = {job.seed for job in same}
        product = (
            f"{len(weights)} weights ({', '.join(f'{weight:g}' for weight in weights)}) x " if len(weights) > 1 else ""
        )
        epochs = " or ".join(str(number) for number in sorted({job.epochs for job in same}))
        trainings = f"{len(seeds)} seeds = {len(same)} trainings" if len(same) > 1 else "1 training"
        lines.append(f"  {name} {loss}: {product}{trainings} of {epochs} epochs")
    return lines


def _attack_label(suite: SuiteConfig, name: str) -> str:
    attack = suite.attacks[name]
    limit = f", at most {attack.n_samples} images" if attack.n_samples else ""
    return f"{name} ({attack.norm}{limit})"


def _expected_time(reference: Path) -> str:
    content = read_provenance(reference)
    seconds = content.get("wall_seconds") or {}
    if not seconds:
        return "expected time: unknown, there is no reference timing of this experiment"
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return f"expected time, nothing done before: {duration(sum(seconds.values()))} ({parts}) on {machine_name(content)}"


def run_step(script: str, *arguments: str) -> None:
    """Run another script of this folder with its output passed through; end the program if it fails.

    Raises:
        KeyboardInterrupt: If the program is interrupted or terminated, once the script has ended.
    """
    show(f"-- {script} {' '.join(arguments)}")
    process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments], cwd=PROJECT_ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt as interrupt:
        # A terminal interrupts the script as well, and subprocess.run would kill it before it has ended its workers.
        # SIGTERM comes to this program alone; and what was started in the background ignores SIGINT.
        if isinstance(interrupt, Interrupted) and interrupt.number == signal.SIGTERM:
            process.terminate()
        for stronger in (signal.SIGTERM, signal.SIGKILL):
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(stronger)
        raise
    if status != 0:
        print(f"error: {script} failed with exit status {status}; the steps after it were not run", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)


def claims_text(study_dir: Path, width: int) -> str:
    """Lay out a study's claims for a terminal of ``width`` columns: each claim, then a line per group.

    Raises:
        UserError: If the study has no table of claims.
    """
    path = study_dir / "tables" / "claims.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing; evaluate the study: scripts/evaluate.py study={study_dir.name}")
    claims = pd.read_csv(path, dtype={"data": str, "model": str}).sort_values("claim", kind="stable")
    cells = [
        (
            str(row["claim"]),
            str(row["statement"]),
            "overall" if row["data"] == "all" else f"{row['data']}/{row['model']}",
            str(row["verdict"]),
            fixed(row["effect"], 3) + interval(fixed(row["ci_low"], 3), fixed(row["ci_high"], 3)),
            "" if pd.isna(row["n"]) else f"n={int(row['n'])}",
        )
        for row in claims.to_dict("records")
    ]
    group_width, verdict_width = (max((len(row[column]) for row in cells), default=0) for column in (2, 3))
    lines = [f"Claims of {study_dir.name} (verdict, effect [95 % interval], n)"]
    for (claim, statement), rows in groupby(cells, key=lambda row: row[:2]):
        effect_name = f" (effect: {EFFECTS[claim]})" if claim in EFFECTS else ""
        lines += textwrap.wrap(f"{claim}  {statement}{effect_name}", width, subsequent_indent="    ")
        for _, _, group, verdict, effect, n in rows:
            start = f"    {group:<{group_width}}  {verdict:<{verdict_width}}"
            fits = len(start) + len(effect) + len(n) + 4 <= width
            lines.append(start.rstrip() if not fits else f"{start}  {effect}  {n}".rstrip())
            if not fits:
                lines.append(f"    {'':<{group_width}}  {effect}  {n}".rstrip())
    return "\n".join(lines)


def outputs_text(study_dir: Path) -> str:
    """Name the report and the figures of a study."""
    figures = sorted((study_dir / "figures").glob("*.png"))
    return "\n".join(
        [f"Report:  {study_dir / 'REPORT.md'}", f"Figures: {len(figures)} in {study_dir / 'figures'}"]
        + [f"  {path.name}" for path in figures]
    )


def wrapped(text: str, width: int) -> str:
    """Break each line of ``text`` that is longer than ``width`` columns, and indent what follows; words stay whole."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(part for line in text.splitlines() for part in wrapper.wrap(line))


def terminal_width() -> int:
    """Return the columns to write to, between 60 and 120."""
    return min(120, max(60, shutil.get_terminal_size((100, 24)).columns))


def show(text: str) -> None:
    """Print a block before any output of the step that follows."""
    print(text + "\n", flush=True)


if __name__ == "__main__":
    run_script(main, interrupted="interrupted; the same command goes on where it stopped")
