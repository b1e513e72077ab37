"""The configs of many jobs: what is set on copies equals what Hydra composes in full, mistakes included."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from drs.composition import Composer
from drs.config import PROJECT_ROOT, train_config
from drs.errors import UserError
from drs.sweeper import expand_grid, register_plugins

CONFIGS = str(PROJECT_ROOT / "configs")
EXPERIMENTS = sorted(path.stem for path in (PROJECT_ROOT / "configs" / "experiment").glob("*.yaml"))


class Counting:
    """Composes with Hydra and counts how often."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, overrides: list[str]) -> DictConfig:
        self.calls.append(overrides)
        return compose("train", overrides)


def composer(full: Counting) -> Composer:
    return Composer(full, GlobalHydra.instance().config_loader().repository.group_exists)


def test_jobs_of_the_experiments_are_as_hydra_composes_them() -> None:
    register_plugins()
    full = Counting()
    kinds: dict[frozenset[str], list[str]] = {}
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for experiment in EXPERIMENTS:
            base = [f"experiment={experiment}"]
            for product in OmegaConf.to_container(compose("train", base).grid):
                # Composing all of several hundred takes minutes: one for each set of keys that are not of every job.
                kinds[frozenset(key for key in product if "." in key or key == "procedure")] = expand_grid(
                    [product], base
                )[-1]
        made = composer(full)
        for overrides in kinds.values():
            assert repr(made.train_config(overrides)) == repr(train_config(compose("train", overrides))), overrides
    assert len(kinds) > 3
    assert not any("seed=" in text for call in full.calls for text in call), "none was composed in full"


def test_values_are_set_on_copies_of_one_composition() -> None:
    register_plugins()
    full = Counting()
    grid = expand_grid([], ["loss=dr_softmax,ce", "seed=range(40)", "data=digits", "study=s"])
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        made = composer(full)
        configs = [made.train_config(job) for job in grid]
    assert full.calls == [["loss=dr_softmax", "data=digits"], ["loss=ce", "data=digits"]]
    assert [config.seed for config in configs] == [*range(40)] * 2
    assert {config.study for config in configs} == {"s"}
    assert configs[0].data.mean is not configs[1].data.mean


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.weight=1", "optim.learning_rate=1e-3", "data.train_samples=20000"],
        ["data.train_samples=null", "data.root=/a/b", "progress=false", "study='quoted'"],
        ["procedure=adversarial", "procedure.epsilon=8/255", "procedure.random_start=false"],
        ["model=resnet9", "optim=sgd", "optim.momentum=0", "optim.nesterov=false"],
        ["seed=1", "seed=2"],
        ["+data.mean=[0.1]", "seed=3"],
        ["model=mlp", "data.mean=[0.25]", "model.options={width: 64}"],
        ["results_dir=${study}/x", "study=y"],
        ["++seed=4", "loss.weight=0.1"],
        ["~suite", "seed=3"],
    ],
)
def test_every_kind_of_override_is_as_hydra_composes_it(overrides: list[str]) -> None:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        made = composer(Counting())
        made.train_config(["seed=5", *overrides])
        expected = train_config(compose("train", ["seed=6", *overrides]))
        assert repr(made.train_config(["seed=6", *overrides])) == repr(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sede=1"], ["loss.wieght=1"], ["loss=nope"], ["seed=abc"], ["seed=1.5"], ["seed="], ["data=5"], ["optim.x=1"],
        ["data=null"], ["model.options=3"], ["epochs=0"], ["seed=[1]"], ["loss.weight=true"], ["study=???"],
        ["loss=ce", "loss.weight=0.1"], ["data@model=mnist"],
    ],
)  # fmt: skip
def test_mistakes_are_told_as_hydra_tells_them(overrides: list[str]) -> None:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        with pytest.raises((UserError, HydraException, ValueError)) as full:
            train_config(compose("train", overrides))
        with pytest.raises((UserError, HydraException, ValueError)) as fast:
            composer(Counting()).train_config(overrides)
    assert (type(fast.value), str(fast.value)) == (type(full.value), str(full.value))


def test_value_that_others_are_made_of_is_composed_in_full(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("seed: 1\nepochs: ${seed}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        plain = composer(Counting())._plain(["seed=3"])
        assert plain is None
        assert compose("train", ["seed=3"]).epochs == 3
