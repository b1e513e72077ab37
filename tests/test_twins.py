"""Which cross-entropy run a transfer attack is made on."""

from itertools import permutations
from pathlib import Path

import pytest
from conftest import compose_train

from drs.cells import find_twin
from drs.config import TrainConfig, run_id
from drs.runs import RunFolder

COMMON = ["data=mnist", "model=lenet", "loss=ce", "optim=adam", "epochs=2"]
ADVERSARIAL = ["procedure=adversarial", "procedure.epsilon=0.1", "epochs=3", "data.train_samples=12000"]


def study(*runs: list[str]) -> tuple[list[RunFolder], dict[RunFolder, TrainConfig]]:
    """Return a folder for each run of a study, none of which exists, and all of them with their configs."""
    configs = [compose_train(*COMMON, *overrides) for overrides in runs]
    folders = [RunFolder(Path(run_id(config))) for config in configs]
    return folders, dict(zip(folders, configs, strict=True))


@pytest.mark.parametrize(
    "other", ["epochs=4", "optim=sgd", "batch_size=32", "data.train_samples=12000", "precision=bfloat16"]
)
def test_of_two_runs_of_one_seed_the_twin_is_the_one_alike_in_everything_but_the_loss(other: str) -> None:
    folders, known = study([], [other], ["loss=dr_softmax"], ["loss=dr_softmax", other], ["seed=1"])
    ce, other_ce, dr, other_dr, _ = folders
    for order in permutations(folders):
        configs = {run: known[run] for run in order}
        assert find_twin(dr, configs) == ce
        assert find_twin(other_dr, configs) == other_ce


def test_run_without_a_twin_like_it_has_the_one_of_standard_training() -> None:
    folders, known = study([], ADVERSARIAL, ["loss=dr_softmax", *ADVERSARIAL], ["seed=1"])
    ce, adversarial, both, _ = folders
    assert find_twin(adversarial, known) == find_twin(both, known) == ce
    assert find_twin(both, {run: known[run] for run in folders if run != ce}) is None, "no other seed stands in"


def test_cross_entropy_run_has_the_next_seed_of_those_like_it() -> None:
    folders, known = study(*([f"seed={seed}", f"epochs={2 + 2 * (seed == 1)}"] for seed in range(4)))
    zero, one, two, three = folders
    assert find_twin(zero, known) == two, "seed 1 was trained longer"
    assert find_twin(two, known) == three
    assert find_twin(three, known) == zero
    assert find_twin(one, known) == two, "none is like it"
