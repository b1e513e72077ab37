"""All runs of a study, setting by setting -> what they add to its tables; where many are to be read, in processes.

Runs of one setting come together: a softmax profile takes all their samples, and thousands of runs' are too many at
once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drs.cells import Cell
from drs.evaluation_workers import worker_pool
from drs.reduction import Reduction, find_profile, find_reduction, reduce_profile, reduce_run
from drs.suite_config import SuiteConfig

SPREAD_RUNS = 100
"""How many runs are read in one process: others take as long to start."""


@dataclass(frozen=True)
class SettingReduction:
    """What the runs of one setting add to a study's tables.

    Attributes:
        runs: What each run adds, in order.
        profile: Rows of softmax_profile.csv over their samples together, without what names the setting.
    """

    runs: list[Reduction]
    profile: list[dict[str, Any]]


Setting = list[list[Cell]]
"""All cells of each run, the clean one first."""


def reduce_settings(settings: list[Setting], suite: SuiteConfig, workers: int = 1) -> Iterator[SettingReduction]:
    """Yield what each setting adds to the tables, in order; what is kept of it is not made again.

    Args:
        settings: The runs of each.
        suite: The suite that their cells belong to.
        workers: How many processes may read cells, where those of more than ``SPREAD_RUNS`` runs are to be read.

    Raises:
        DamagedFileError: If the file of a cell is not what was written.
    """
    kept = [_find(setting, suite) for setting in settings]
    stale = [setting for setting, found in zip(settings, kept, strict=True) if found is None]
    if workers == 1 or sum(map(len, stale)) <= SPREAD_RUNS:
        made: Iterator[SettingReduction] = (reduce_setting(setting, suite) for setting in stale)
        yield from (next(made) if found is None else found for found in kept)
        return
    with worker_pool(min(workers, len(stale))) as pool:
        made = pool.map(reduce_setting, stale, [suite] * len(stale))
        yield from (next(made) if found is None else found for found in kept)


def reduce_setting(setting: Setting, suite: SuiteConfig) -> SettingReduction:
    """Return what the runs of one setting add to the tables."""
    runs = [reduce_run(cells[0].run, cells, suite) for cells in setting]
    return SettingReduction(runs, reduce_profile([cells[0] for cells in setting], suite))


def _find(setting: Setting, suite: SuiteConfig) -> SettingReduction | None:
    profile = find_profile([cells[0] for cells in setting], suite)
    if profile is None:
        return None
    runs = [find_reduction(cells[0].run, cells, suite) for cells in setting]
    known = [found for found in runs if found is not None]
    return SettingReduction(known, profile) if len(known) == len(runs) else None
