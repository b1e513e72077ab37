"""Show the state of a study: what is done, running, interrupted, failed and waiting, and the time left.

    python scripts/status.py STUDY [--experiment NAME] [--suite NAME]

It works at any time, beside running sweeps too, and changes nothing. With an experiment, by default the one that is
called like the study, the trainings of its grid that were not started yet are counted as waiting, and its suite's cells
are counted; --suite counts those of another suite.
"""

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra import compose, initialize_config_dir

from drs.config import PROJECT_ROOT, SuiteConfig, TrainConfig, evaluate_config, run_id
from drs.durations import duration
from drs.entrypoint import run_script
from drs.errors import UserError
from drs.runs import study_folder
from drs.study_state import STATES, CellCount, RunState, count_cells, read_states, seconds_left, share, titles
from drs.sweeper import grid_jobs, register_plugins

LISTED = 20
"""Of each state at most so many runs are listed; the others are counted."""
INDENT = 15
"""Where a run's id stands, and what does not fit on its line."""


def main() -> int:
    """Print the state of the study named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY", help="the study's name")
    parser.add_argument("--experiment", metavar="NAME", help="the file of configs/experiment that it comes from")
    parser.add_argument("--suite", metavar="NAME", help="a file of configs/suite, such as paper")
    arguments = parser.parse_args()
    study = study_folder(os.environ.get("DRS_RESULTS") or "results", arguments.study)
    experiment = arguments.experiment or _experiment_called(arguments.study)
    grid = [config for _, config in grid_jobs(experiment, f"study={arguments.study}")] if experiment else []
    states = read_states(study, grid)
    suite = _suite(experiment, arguments.suite, arguments.study)
    cells = count_cells(states, suite) if suite is not None else None
    print(status_text(study, states, grid, cells, width=shutil.get_terminal_size((100, 24)).columns))
    return 0


def _experiment_called(study: str) -> str | None:
    return study if (PROJECT_ROOT / "configs" / "experiment" / f"{study}.yaml").is_file() else None


def _suite(experiment: str | None, suite: str | None, study: str) -> SuiteConfig | None:
    chosen = [f"experiment={experiment}"] * bool(experiment) + [f"suite={suite}"] * bool(suite)
    if not chosen:
        return None
    known = sorted(path.stem for path in (PROJECT_ROOT / "configs" / "suite").glob("*.yaml"))
    if suite is not None and suite not in known:
        raise UserError(f"suite={suite}: unknown; it is one of {', '.join(known)}")
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return evaluate_config(compose("evaluate", [*chosen, f"study={study}"])).suite


def status_text(
    study: Path, states: list[RunState], grid: list[TrainConfig], cells: CellCount | None, *, width: int
) -> str:
    """Lay out a study's state for a terminal of ``width`` columns: counts, those that need attention, the time left."""
    counts = Counter(state.state for state in states)
    told = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name]) or "none"
    lines = [f"{study.name}: {len(states)} trainings: {told}"]
    configs = {run_id(config): config for config in grid}
    for name in ("running", "interrupted", "failed", "diverged", "damaged"):
        some = [state for state in states if state.state == name]
        what = titles(some[:LISTED], configs)
        for state in some[:LISTED]:
            progress = f"epoch {state.epoch} of {state.epochs}" if state.epochs and name != "diverged" else ""
            parts = [what[state.run.run_id], progress, state.detail]
            lines.append(f"  {name:<11}  {state.run.run_id}  {'; '.join(part for part in parts if part)}")
        if len(some) > LISTED:
            lines.append(f"  {name:<11}  and {len(some) - LISTED} more")
    if cells is not None:
        lines.append(f"evaluation of the finished runs, {cells.suite} suite: {_evaluated(cells)}")
        lines += [f"  failed       {run.run_id}  {error}" for run, error in cells.failures[:LISTED]]
        if len(cells.failures) > LISTED:
            lines.append(f"  failed       and {len(cells.failures) - LISTED} more")
    lines.append(_time_left(states, grid, counts))
    wrapper = textwrap.TextWrapper(max(width, 60), subsequent_indent=" " * INDENT, break_on_hyphens=False)
    return "\n".join(part for line in lines for part in wrapper.wrap(line))


def _evaluated(cells: CellCount) -> str:
    if not cells.total:
        return "nothing to evaluate yet"
    missing = cells.total - cells.done
    at_work = f", {cells.working} run{'s' * (cells.working != 1)} being evaluated" if cells.working else ""
    return f"{cells.done} of {cells.total} cells done ({share(cells.done, cells.total)}), {missing} missing{at_work}"


def _time_left(states: list[RunState], grid: list[TrainConfig], counts: Counter[str]) -> str:
    if not any(counts[name] for name in ("running", "interrupted", "failed", "damaged", "waiting")):
        return ""
    seconds = seconds_left(states, grid)
    if seconds is None:
        return "trainings left: the time is unknown until one has finished"
    running = counts["running"]
    pace = f"{running} at a time, as now" if running else "one at a time; none is running now"
    return f"trainings left: about {duration(seconds, rough=True)} ({pace})"


if __name__ == "__main__":
    run_script(main)
