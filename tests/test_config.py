"""Configs: identity, ranges, grids and the one-line errors of the command line."""

from dataclasses import replace
from pathlib import Path

import forked
import pytest
from hydra import compose, initialize_config_dir

from drs.config import (
    PROJECT_ROOT,
    TrainConfig,
    evaluate_config,
    identity,
    loss_label,
    procedure_name,
    run_id,
    train_config,
)
from drs.errors import UserError
from drs.suite_config import parse_epsilon
from drs.sweeper import expand_grid, grid_jobs, register_plugins

CONFIGS = str(PROJECT_ROOT / "configs")


def train(*overrides: str) -> TrainConfig:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return train_config(compose("train", list(overrides)))


def test_identity_leaves_out_what_does_not_decide_the_result() -> None:
    config = train()
    for other in (
        "study=other",
        "device=cpu",
        "progress=false",
        "results_dir=/elsewhere",
        "data.cache=x",
        "data.root=y",
    ):
        assert run_id(train(other)) == run_id(config), other
    for other in (
        "seed=1",
        "loss.weight=0.1",
        "epochs=3",
        "optim.learning_rate=0.2",
        "data.validation=100",
        "model=mlp",
    ):
        assert run_id(train(other)) != run_id(config), other


def test_equal_numbers_have_equal_identity() -> None:
    assert run_id(train("loss.weight=0.005")) == run_id(train("loss.weight=5e-3"))
    assert run_id(train("loss.weight=1")) == run_id(train("loss.weight=1.0"))


DATA = ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]
LOSSES = ["ce", "dr_softmax", "label_smoothing", "gce", "cot", "logit_squeezing", "confidence_penalty"]


@pytest.mark.parametrize(
    ("data", "loss"), [*((data, "ce") for data in DATA), *(("cifar10", loss) for loss in LOSSES[1:])]
)
def test_every_data_set_and_loss_composes(data: str, loss: str) -> None:
    config = train(f"data={data}", f"loss={loss}", "model=resnet9", "optim=sgd")
    assert (config.data.name, config.loss.name) == (data, loss)
    assert len(config.data.mean) == config.data.channels


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.weight=-1", r"loss\.weight=-1\.0: must be a finite number, at least 0"),
        ("loss.weight=nan", r"loss\.weight=nan: must be a finite number"),
        ("seed=abc", "seed=abc: Value 'abc'"),
        ("seed=-1", "seed=-1: must be between"),
        ("epochs=0", "epochs=0: must be at least 1"),
        ("device=tpu", "device=tpu: must be auto"),
        ("study=../up", r"study=\.\./up: must be one path component"),
        ("study=reference", "study=reference"),
        ("precision=half", "precision=half: must be one of float32, bfloat16"),
        ("loss.space=probs", "loss.space=probs: must be one of"),
        ("data.augment=mixup", "data.augment=mixup: must be one of"),
        ("optim.warmup=0", "optim.warmup=0"),
        ("optim.learning_rate=inf", r"optim\.learning_rate=inf: must be a finite number above 0"),
        ("optim.weight_decay=inf", r"optim\.weight_decay=inf: must be a finite number, at least 0"),
        ("data.mean=[1e999]", r"data\.mean=\[inf\]: must be finite numbers"),
        ("data.std=[0]", r"data\.std=\[0\.0\]: must be finite numbers above 0"),
    ],
)
def test_value_out_of_range_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(override)


def test_unknown_key_in_a_file_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown key 'loss\.wieght'; did you mean 'loss\.weight'\?"):
        train("+loss.wieght=1")


@pytest.mark.parametrize(
    ("text", "norm", "value"), [("8/255", "linf", 8 / 255), ("0.1", "linf", 0.1), (1, "linf", 1.0), ("3/2", "l2", 1.5)]
)
def test_epsilon_is_a_number_or_a_fraction(text: object, norm: str, value: float) -> None:
    assert parse_epsilon(text, norm, "key").value == value


@pytest.mark.parametrize(
    ("text", "norm", "message"),
    [
        (0, "linf", "above 0"),
        (-1, "l2", "above 0"),
        (8, "linf", "8 of 255 grey levels is 8/255"),
        ("x", "l2", "a number"),
        ("1/0", "l2", "a number"),
        (8.1, "l2", r"key=8.1: must be at most sqrt\(1\*8\*8\) = 8"),
        ("nan", "linf", "a number"),
    ],
)
def test_bad_epsilon_is_refused(text: object, norm: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_epsilon(text, norm, "key", "digits")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suite.epsilons.digits.l2=[50]", r"suite\.epsilons\.digits\.l2=50: must be at most sqrt\(1\*8\*8\) = 8;"),
        (
            "suite.epsilons.cifar10.l2=[56]",
            r"suite\.epsilons\.cifar10\.l2=56: must be at most sqrt\(3\*32\*32\) = 55\.43;",
        ),
        ("suite.epsilons.digits.linf=8/255", r"suite\.epsilons\.digits\.linf=8/255: .* write \[8/255\]"),
        ("suite.decisive_epsilons.digits.l2=0.5", r"suite\.decisive_epsilons\.digits\.l2=0\.5: .* write \[0\.5\]"),
        ("suite.epsilons.digits.linf=[]", r"suite\.epsilons\.digits\.linf is missing"),
        (
            "suite.epsilons.digits.linf=[0.1,0.2,1/10]",
            r"digits\.linf: 0\.1 and 1/10 are the same; list each epsilon once",
        ),
        ("suite.epsilons.digits=8/255", r"suite\.epsilons\.digits=8/255: must name norms"),
    ],
)
def test_epsilons_of_a_suite_are_refused_by_key_value_and_what_is_right(override: str, message: str) -> None:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        composed = compose("evaluate", ["suite=strong", override])
        with pytest.raises(UserError, match=message):
            evaluate_config(composed)


def test_the_way_out_of_the_targeted_attack_for_three_classes_composes() -> None:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        suite = evaluate_config(compose("evaluate", ["suite=strong", "~suite.attacks.apgd_t"])).suite
    assert "apgd_t" not in suite.attacks and "targeted_pgd" in suite.attacks


def test_grid_is_a_union_of_products_and_arguments_win() -> None:
    grid = [
        {"data": "mnist", "loss": "ce", "seed": "0,1"},
        {"data": "cifar10", "loss": "dr_softmax", "loss.weight": "0.1,0.2", "seed": 0},
    ]
    jobs = expand_grid(grid, ["study=s"])
    assert ["data=mnist", "loss=ce", "seed=1", "study=s"] in jobs
    assert len(jobs) == 4
    assert expand_grid(grid, ["seed=7"]) == [
        ["data=mnist", "loss=ce", "seed=7"],
        ["data=cifar10", "loss=dr_softmax", "loss.weight=0.1", "seed=7"],
        ["data=cifar10", "loss=dr_softmax", "loss.weight=0.2", "seed=7"],
    ]
    assert expand_grid([], ["seed=1,2"]) == [["seed=1"], ["seed=2"]]


def test_laptop_study_has_the_promised_models() -> None:
    configs = [config for _, config in grid_jobs("laptop")]
    every = [config for config in configs if config.data.name == "mnist"]
    mnist = [config for config in every if loss_label(config) in ("ce", "dr_softmax")]
    weights = sorted({config.loss.weight for config in mnist if config.loss.name == "dr_softmax"})
    assert len(mnist) >= 24
    assert len(weights) >= 5
    assert weights[-1] / weights[0] >= 100
    assert len({config.seed for config in mnist}) == 4
    comparators = {"label_smoothing", "gce", "cot", "logit_squeezing", "confidence_penalty"}
    procedures = {"adversarial", "trades", "adversarial+dr_softmax"}
    assert {loss_label(config) for config in every} == {"ce", "dr_softmax"} | comparators | procedures
    assert all(config.data.train_samples is None for config in every if procedure_name(config) == "standard")
    assert len([config for config in configs if config.data.name == "cifar10"]) >= 6
    assert len({run_id(config) for config in configs}) == len(configs)


def test_standard_training_is_what_a_run_without_a_procedure_means() -> None:
    """Run folders from before there were procedures keep their names."""
    plain = train("data=digits", "model=mlp", "loss=ce", "seed=3")
    assert "procedure" not in identity(plain)
    assert run_id(plain) == "89254e2581af"
    hard = train("data=digits", "model=mlp", "loss=ce", "seed=3", "procedure=adversarial", "procedure.epsilon=8/255")
    assert identity(hard)["procedure"]["epsilon"] == 8 / 255
    assert run_id(hard) != run_id(plain)
    labels = {
        ("ce", "standard"): "ce",
        ("dr_softmax", "standard"): "dr_softmax",
        ("ce", "trades"): "trades",
        ("gce", "adversarial"): "adversarial+gce",
    }
    for (loss, procedure), label in labels.items():
        bound = [] if procedure == "standard" else ["procedure.epsilon=0.1"]
        config = train("data=digits", "model=mlp", f"loss={loss}", f"procedure={procedure}", *bound)
        assert loss_label(config) == label


@pytest.mark.parametrize("experiment", ["smoke", "mnist", "cifar10"])
def test_experiments_compose_for_both_entrypoints(experiment: str) -> None:
    register_plugins()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        evaluation = evaluate_config(compose("evaluate", [f"experiment={experiment}"]))
        grid = compose("train", [f"experiment={experiment}"]).grid
    assert evaluation.study == experiment
    first = train(*expand_grid([dict(grid[0])], [f"experiment={experiment}"])[0])
    assert first.study == experiment
    assert first.data.name in evaluation.suite.epsilons


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_begins_with_examples_that_compose(tmp_path: Path, script: str) -> None:
    told = forked.run(script, "--help", out=tmp_path / "out").stdout.partition("== Configuration groups")[0]
    examples = [line.split()[2:] for line in told.splitlines() if f" scripts/{script} " in line]
    assert len(examples) > 1
    register_plugins()
    for words in examples:
        overrides = [word.partition(",")[0] for word in words if word != "-m"]
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            composed = compose(script.removesuffix(".py"), overrides, return_hydra_config=True)
        assert composed.study in ("NAME", "laptop")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ["los.weight=1"], ["unknown key 'los'", "did you mean 'loss'", "known here: batch_size, compile"]),
        ("train.py", ["-m", "loss.wieght=1", "seed=0,1"], ["unknown key 'loss.wieght'; did you mean 'loss.weight'"]),
        ("train.py", ["data=digits", "model=lenet"], ["model=lenet", "data.size=8"]),
        ("evaluate.py", ["suite.n_samples.mnist=9"], ["'suite.n_samples.mnist'", "write +suite.n_samples.mnist=VALUE"]),
        ("evaluate.py", ["data=digits"], ["unknown key 'data'", "--help"]),
        ("evaluate.py", ["experiment=laptop", "suite=paper"], ["suite.attacks.margin_pgd: the suite has no attack"]),
        ("evaluate.py", ["+suite.n_samples.mnist=10001"], ["suite.n_samples.mnist=10001", "has 10000 samples"]),
        ("train.py", ["loss=dr"], ["loss/dr", "dr_softmax"]),
        ("train.py", ["loss.weight=-1"], ["loss.weight=-1", "at least 0"]),
        ("train.py", ["-m", "seed=0,abc"], ["seed=abc"]),
        ("train.py", ["device=cuda:63", "data=digits", "model=mlp"], ["device=cuda:63", "device=cpu"]),
        ("train.py", ["procedure=adversarial"], ["procedure.epsilon", "issing"]),
        ("train.py", ["procedure=trades", "procedure.epsilon=8"], ["procedure.epsilon=8", "8/255"]),
        ("train.py", ["data=mnist", "data.size=16"], ["data.size=16", "28 for mnist"]),
        ("evaluate.py", ["workers=0"], ["workers=0", "at least 1"]),
        ("evaluate.py", ["suite=strong", "suite.sanity.steps=0"], ["suite.sanity.steps=0", "above 0"]),
        ("evaluate.py", ["suite=strong", "suite.attacks.margin_pgd.objectives=[dlr]"], ["objectives=dlr", "margin"]),
        ("evaluate.py", ["suite=strong", "suite.decisive_epsilons.mnist.linf=[0.15]"], ["linf=0.15", "0.05, 0.1"]),
        ("evaluate.py", ["study=nothing"], ["study=nothing", "scripts/train.py"]),
        ("evaluate.py", ["suite=strongest"], ["suite/strongest", "paper"]),
        ("evaluate.py", ["suite.epsilons.mnist.linf=[0]"], ["suite.epsilons.mnist.linf=0", "above 0"]),
        ("evaluate.py", ["suite.epsilons.mnist.linf=[8]"], ["suite.epsilons.mnist.linf=8", "8/255"]),
        (
            "evaluate.py",
            ["+suite.attacks.worst_linf.kind=fgsm", "+suite.attacks.worst_linf.norm=linf"],
            ["worst_linf: tables"],
        ),
        (
            "train.py",
            ["-m", "data=digits", "model=mlp", "study=a,b"],
            ["study=a and study=b in one sweep", "by itself"],
        ),
        ("evaluate.py", ["suite.attacks.pgd.kind=pdg"], ["suite.attacks.pgd.kind=pdg", "pgd"]),
    ],
)
def test_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, script: str, arguments: list[str], words: list[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    environment = {"DRS_RESULTS": str(place / "results")}
    done = forked.run(script, *arguments, out=tmp_path / "out", environment=environment, cwd=place)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not list(place.iterdir()), "something was written"


def test_config_objects_are_not_shared_between_compositions() -> None:
    first = train()
    assert replace(first, seed=9) != first
    assert train().loss is not first.loss
