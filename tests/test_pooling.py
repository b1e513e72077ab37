"""Runs that tables would take for seeds of one setting."""

from pathlib import Path

import pytest
from conftest import compose_train

from drs.config import PROJECT_ROOT, run_id
from drs.errors import UserError
from drs.pooling import check_settings
from drs.runs import RunFolder
from drs.sweeper import grid_jobs

EXPERIMENTS = sorted(path.stem for path in (PROJECT_ROOT / "configs" / "experiment").glob("*.yaml"))
DR = ("data=digits", "model=mlp", "loss=dr_softmax")


def check(*jobs: tuple[str, ...]) -> None:
    configs = [compose_train(*job) for job in jobs]
    check_settings({RunFolder(Path("results/s/runs") / run_id(config)): config for config in configs})


def test_seeds_and_settings_are_no_mistake() -> None:
    check(
        (*DR, "seed=0", "device=cpu"), (*DR, "seed=1", "device=cuda", "data.cache=elsewhere"),
        (*DR, "loss.weight=1", "epochs=9"),
        ("data=digits", "model=mlp", "loss=ce", "epochs=3"),
        (*DR, "procedure=adversarial", "procedure.epsilon=0.1", "data.train_samples=500"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ("loss.space=softmax", "loss.space=logits", "loss.space=softmax and logits"),
        ("epochs=2", "epochs=6", "epochs=2 and 6"),
        ("data.train_samples=500", "data.train_samples=null", "data.train_samples=500 and null"),
    ],
)
def test_what_else_varies_within_a_setting_is_named(one: str, other: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check((*DR, one, "seed=0"), (*DR, other, "seed=1"))
    assert f"digits mlp dr_softmax 0.005, but differ in {told};" in str(caught.value)
    assert str(caught.value).endswith("a study of their own, results/OTHER/runs")


def test_attacks_of_a_procedure_belong_to_it() -> None:
    base = ("data=digits", "model=mlp", "loss=ce", "procedure=adversarial")
    with pytest.raises(UserError, match="digits mlp adversarial, but differ in procedure.epsilon=0.05 and 0.4"):
        check((*base, "procedure.epsilon=0.05"), (*base, "procedure.epsilon=0.4", "seed=1"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_study_here_can_be_evaluated(experiment: str) -> None:
    configs = [config for _, config in grid_jobs(experiment)]
    assert configs
    check_settings({RunFolder(Path("results/s/runs") / run_id(config)): config for config in configs})
