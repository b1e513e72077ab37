"""Models packed into one batch against models trained one by one, and the rows of sweeps. No real time is tested."""

import copy
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import compose_train

from drs.benchmarks import packing
from drs.benchmarks.cards import Timing, accuracy_on, lenet_rows, seconds_graphed, seconds_packed
from drs.benchmarks.graphs import fit_graphed
from drs.benchmarks.packing import Fit, TooSlow, fit_packed, warm_up
from drs.benchmarks.sweeps import COMPILED, GRAPHED, PACKED, WAYS, packing_rows, worker_rows
from drs.benchmarks.waiting import WAITS, waiting_rows
from drs.config import TrainConfig
from drs.data import LabelledImages, load_split
from drs.errors import UserError
from drs.filling import load_test
from drs.training import fit

CPU = torch.device("cpu")
SMALL = ["data=digits", "optim=adam", "epochs=2", "batch_size=50"]
ALIKE = ["model=mlp", "loss=dr_softmax"]
EAGER = {"backend": "aot_eager"}
"""Traces and transforms a gradient as a compiler does, and then runs its operations one by one: seconds, not a minute.
"""


@pytest.fixture
def few(digits: tuple[LabelledImages, LabelledImages, LabelledImages]) -> LabelledImages:
    """Two hundred of the digits."""
    return digits[0].first(200)


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has packed gradients compiled in another way, and forgotten afterwards."""
    yield lambda options: monkeypatch.setattr(packing, "COMPILE", options)
    torch.compiler.reset()


def two(*overrides: str) -> list[TrainConfig]:
    """Return configs that differ in all that packed models may differ in."""
    return [
        compose_train(*SMALL, *overrides, "loss=dr_softmax", "loss.weight=0.01", "seed=3"),
        compose_train(*SMALL, *overrides, "loss=ce", "seed=4"),
    ]


def enlarged(configs: list[TrainConfig], data: LabelledImages) -> LabelledImages:
    """Return images of twice the height and width, for which the configs are changed; a LeNet needs 12 pixels."""
    for config in configs:
        config.data.size *= 2
    return LabelledImages(data.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), data.labels)


def weights_of(models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Return the parameters of all models."""
    return [parameter for model in models for parameter in model.parameters()]


@pytest.mark.parametrize("overrides", [["model=mlp"], ["model=lenet"], ["model=mlp", "data.augment=crop_flip"]])
def test_models_trained_as_one_batch_are_those_trained_in_turn(few: LabelledImages, overrides: list[str]) -> None:
    configs = two(*overrides)
    training = enlarged(configs, few) if "model=lenet" in overrides else few
    packed = fit_packed(configs, training, CPU)
    plain = [fit(config, training, training.first(0), CPU)[0] for config in configs]
    assert not any(module.training for model in packed for module in model.modules())
    for one, other in zip(weights_of(packed), weights_of(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_gradients_give_the_same_models(few: LabelledImages, compiled_with: Any) -> None:
    compiled_with(EAGER)
    configs = two("model=mlp")
    plain = weights_of(fit_packed(configs, few, CPU))
    assert warm_up(functools.partial(fit_packed, compiled=True), configs, few, CPU) > 0
    assert [config.epochs for config in configs] == [2, 2]  # what is thrown away leaves the configs alone
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled >= 1
    for one, other in zip(weights_of(fit_packed(configs, few, CPU, compiled=True)), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # warmed up, nothing is compiled anew


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no compiler of C++")
def test_gradients_compiled_as_on_a_card_give_the_same_models(few: LabelledImages, compiled_with: Any) -> None:
    configs = two("model=lenet")
    training = enlarged(configs, few)
    plain = weights_of(fit_packed(configs, training, CPU))
    for one, other in zip(weights_of(fit_packed(configs, training, CPU, compiled=True)), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_written_over_by_the_next_call_do_no_harm(
    few: LabelledImages, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """A CUDA graph returns the same memory each time, and what it returned before is void once it is called again."""
    configs = two("model=mlp")
    plain = weights_of(fit_packed(configs, few, CPU))
    real = packing._gradients
    steps: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))

    def graph_of(config: TrainConfig, *, compiled: bool) -> packing.Gradients:
        gradients, memory = real(config, compiled=False), dict[str, torch.Tensor]()

        def replay(*inputs: Any) -> dict[str, torch.Tensor]:
            for held in memory.values():
                held.fill_(torch.nan)
            for name, value in gradients(*inputs).items():
                assert not value.requires_grad  # no second derivative is prepared
                memory.setdefault(name, torch.empty_like(value)).copy_(value)
            return memory

        return replay

    monkeypatch.setattr(packing, "_gradients", graph_of)
    assert all(map(torch.equal, weights_of(fit_packed(configs, few, CPU, compiled=compiled)), plain))
    assert len(steps) == (8 if compiled else 0)  # each of two epochs of four steps says that a replay begins


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.reduction=mean"], "loss.reduction=mean: only loss.reduction=sum is packed"),
        (["loss.space=softmax"], "loss.space=softmax: only loss.space=log_softmax is packed"),
        (["loss.center=all_classes"], "loss.center=all_classes: only loss.center=non_label is packed"),
        (["loss.ce_weight=3"], "loss.ce_weight=3.0: only loss.ce_weight=1.0 is packed"),
        (["loss=logit_squeezing", "loss.noise_std=0.5"], "loss.name=logit_squeezing: only ce and dr_softmax are"),
        (["procedure=adversarial", "procedure.epsilon=0.1"], "procedure.name=adversarial: only procedure.name="),
        (["procedure=trades", "procedure.epsilon=0.1"], "procedure.name=trades: only procedure.name=standard"),
        (["precision=bfloat16"], "precision=bfloat16: only precision=float32 is packed"),
        (["compile=true"], "compile=True: only compile=False is packed"),
        (["optim=sgd"], "optim.name=sgd: only optim.name=adam is packed"),
        (["optim=adamw"], "optim.name=adamw: only optim.name=adam is packed"),
        (["model=smallcnn"], "model.name=smallcnn: training changes the buffers of 1.0.1; only models whose"),
        (["model=resnet18"], "model.name=resnet18: training changes the buffers of 1.bn1; only models whose"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_named(few: LabelledImages, overrides: list[str], message: str) -> None:
    config = compose_train(*SMALL, *ALIKE, *overrides)
    with pytest.raises(ValueError) as error:
        fit_packed([config], few, CPU)
    assert str(error.value).startswith(message)
    if "model" not in overrides[0]:  # nor as one of several
        with pytest.raises(ValueError) as error:
            fit_packed([compose_train(*SMALL, *ALIKE), config], few, CPU)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=20", "batch_size=20: 50 in the first config; packed models differ in seed, loss and weight"),
        ("epochs=3", "epochs=3: 2 in the first config"),
        ("optim.learning_rate=0.5", "optim.learning_rate=0.5: "),
        ("optim.schedule=constant", "optim.schedule=constant: one_cycle in the first config"),
        ("model.options.width=16", "model.options={'width': 16}: {'width': 256} in the first config"),
        ("data.augment=crop", "data.augment=crop: none in the first config"),
        ("data.mean=[0.5]", "data.mean=[0.5]: [0.3056] in the first config"),
        ("device=cuda", "device=cuda: auto in the first config"),
    ],
)
def test_models_that_differ_otherwise_are_not_packed(few: LabelledImages, override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit_packed([compose_train(*SMALL, *ALIKE), compose_train(*SMALL, *ALIKE, override)], few, CPU)
    assert str(error.value).startswith(message)


def test_packing_asks_for_models_and_labels_that_there_are(few: LabelledImages) -> None:
    with pytest.raises(ValueError, match="there is no config"):
        fit_packed([], few, CPU)
    config = compose_train(*SMALL, *ALIKE)
    config.data.num_classes = 9
    with pytest.raises(UserError, match="digits has the label 9"):
        fit_packed([config], few, CPU)


def test_packing_rows_beside_trainings_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled_with: Any
) -> None:
    compiled_with(EAGER)
    monkeypatch.setattr("drs.benchmarks.sweeps.SIZES", (2,))
    monkeypatch.setattr("drs.benchmarks.sweeps.REPEATS", 1)
    config = compose_train(*SMALL, *ALIKE, "data.train_samples=200", f"data.cache={tmp_path}")
    (row,) = packing_rows(config, CPU)
    assert (row.ours, row.device, row.case) == (PACKED, "cpu", "2 trainings of 8 steps of 50 images, mlp")
    assert row.tried and row.ours_median / row.theirs_median == pytest.approx(row.ratio)  # type: ignore[operator]
    monkeypatch.setitem(WAYS, "cpu", WAYS["cuda"])
    graphed, compiled, plain = packing_rows(config, CPU)
    assert [graphed.ours, compiled.ours, plain.ours] == [GRAPHED, COMPILED, PACKED]
    assert "those of training it alone" in graphed.note and "computed in groups" in compiled.note
    assert "s to compile" in compiled.note and "compile" not in plain.note + graphed.note
    torch.compiler.reset()
    compiled_with({"backend": _no_compiler})

    def no_graph(*_: Any) -> None:
        raise RuntimeError("operation not\npermitted when stream is capturing")

    monkeypatch.setattr("drs.benchmarks.sweeps.fit_graphed", no_graph)
    *failed, plain = packing_rows(config, CPU)
    assert [row.verdict for row in failed] == ["not measured"] * 2 and {row.repeats for row in failed} == {0}
    assert failed[0].note == "not captured: operation not permitted when stream is capturing"
    assert failed[1].note.startswith("not compiled: ") and "no compiler here" in failed[1].note
    assert plain.ours == PACKED and plain.ratio is not None


def _no_compiler(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError("no compiler here")


@pytest.mark.parametrize(("device", "warmup"), [("cpu", 0), ("cuda", 1)])
def test_a_card_is_warm_before_packing_is_timed(
    few: LabelledImages, monkeypatch: pytest.MonkeyPatch, device: str, warmup: int
) -> None:
    timed: list[tuple[int, dict[str, Any]]] = []
    done: list[tuple[str, dict[str, Any]]] = []

    def time_in_turn(functions: Any, repeats: int, **options: Any) -> np.ndarray:
        timed.append((len(functions), options))
        for function in functions:
            function()
        return np.arange(1.0, len(functions) + 1).repeat(repeats).reshape(len(functions), repeats).T

    def note_down(name: str) -> Any:
        return lambda *_, **options: done.append((name, options)) or 1.0

    monkeypatch.setattr("drs.benchmarks.sweeps.SIZES", (2,))
    monkeypatch.setattr("drs.benchmarks.sweeps.load_split", lambda *_: (few, few))
    monkeypatch.setattr("drs.benchmarks.sweeps.time_in_turn", time_in_turn)
    for name in ("fit", "fit_packed", "fit_graphed"):
        monkeypatch.setattr(f"drs.benchmarks.sweeps.{name}", note_down(name))
    monkeypatch.setattr("drs.benchmarks.sweeps.warm_up", lambda train, *_: done.append(("warm_up", {})) or train() or 1)
    rows = list(packing_rows(compose_train(*SMALL, *ALIKE), torch.device(device)))
    ways = len(WAYS[device])
    assert timed == [(1 + ways, {"warmup": warmup, "device": device})]
    assert [row.ratio for row in rows] == [1 / 2, 1 / 3, 1 / 4][:ways] and {row.device for row in rows} == {device}
    assert [row.ours_median for row in rows] == [60.0, 40.0, 30.0][:ways]
    assert {row.theirs_median for row in rows} == {120.0}
    graphed, compiled, plain = (
        ("fit_graphed", {}),
        ("fit_packed", {"compiled": True}),
        ("fit_packed", {"compiled": False}),
    )
    in_turn = [("fit", {})] * 2
    if device == "cuda":
        assert done == [("warm_up", {}), graphed, ("warm_up", {}), compiled, *in_turn, graphed, compiled, plain]
    else:
        assert done == [*in_turn, plain]


@pytest.mark.parametrize("train", [fit_packed, fit_graphed])
def test_a_training_ends_early_where_its_pace_is_hopeless(
    few: LabelledImages, monkeypatch: pytest.MonkeyPatch, train: Fit
) -> None:
    configs = two("model=mlp", "epochs=6")  # of 4 steps
    clock = iter(range(0, 1000, 9))
    monkeypatch.setattr("drs.benchmarks.packing.time.perf_counter", lambda: float(next(clock)))
    with pytest.raises(TooSlow) as error:  # 9 s between steps 2 and 20
        train(configs, few, CPU, pace=packing.Pace(11, CPU))
    assert str(error.value) == "projected from its first 20 steps: 12 s, not run to the end"
    assert len(train(configs, few, CPU, pace=packing.Pace(13, CPU))) == 2


@pytest.mark.parametrize("seconds_of", [seconds_graphed, seconds_packed])
def test_many_trainings_are_timed_with_seeds_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds_of: Any
) -> None:
    config = compose_train(*SMALL, *ALIKE, "data.train_samples=200", "epochs=6", f"data.cache={tmp_path}")
    timing = seconds_of(config, 2, CPU)
    assert timing.seconds > 0 and config.seed == 0
    training = load_split(config.data, CPU)[0]
    for seed, model in enumerate(timing.models):
        config.seed = seed
        plain = fit(config, training, training.first(0), CPU)[0]
        for one, other in zip(weights_of([model]), weights_of([plain]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(TooSlow):
        seconds_of(config, 2, CPU, 0.0)


def test_lenets_trained_wrongly_or_too_slowly_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_train(*SMALL, *ALIKE, "epochs=1", f"data.cache={tmp_path}")
    model = fit(config, *load_split(config.data, CPU), CPU)[0]
    accuracy = 100 * accuracy_on(model, load_test(config.data, None, CPU)[0])
    broken = copy.deepcopy(model)
    for weights in broken.parameters():
        weights.data.zero_()  # always of class 0

    def stopped() -> float:
        raise TooSlow("projected from its first 20 steps: 700 s, not run to the end")

    ways = {"right": lambda: Timing(9.0, [model] * 2), "slow": stopped, "wrong": lambda: Timing(3.0, [model, broken])}
    right, slow, wrong, best = lenet_rows(config, 2, 60, "cpu", ways)  # type: ignore[arg-type]
    assert slow.verdict == "not measured" and slow.note.startswith("projected from its first 20 steps: 700 s")
    assert right.note == f"mean test accuracy of 2 models {accuracy:.2f} %, sd 0.00 points"
    zeros = 100 * float((load_test(config.data, None, CPU)[0].labels == 0).float().mean())
    spread = np.std([accuracy, zeros], ddof=1)
    assert f"{(accuracy + zeros) / 2:.2f} %, sd {spread:.2f} points" in wrong.note
    assert (best.ours, best.ours_median, best.verdict) == ("wrong", 3.0, "met") and wrong.note in best.note
    *_, nothing = lenet_rows(config, 2, 60, "cpu", {"slow": stopped})
    assert nothing.verdict == "not measured" and nothing.note == "nothing of what was tried ended"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_are_timed_on_the_device_that_their_row_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("epochs=none" in command), "", "gone wrong")

    monkeypatch.setattr("drs.benchmarks.sweeps.subprocess.run", run)
    small = [*SMALL, *ALIKE]
    (row,) = worker_rows(small, tmp_path, {}, 2, *([] if device == "cpu" else [device]))
    assert len(commands) == 6 and all(f"device={device}" in command for command in commands)
    assert sum("hydra/launcher=joblib" in command for command in commands) == 3
    settings = [word for word in commands[0][3:] if not word.startswith(("hydra", "seed="))]
    assert compose_train(*settings).device == device
    assert (row.device, row.ours, row.theirs) == (device, "2 joblib workers", "one worker")
    assert row.least is None and not row.floor
    with pytest.raises(RuntimeError, match="the sweep ended with 1: gone wrong"):
        list(worker_rows([*small, "epochs=none"], tmp_path, {}, 2))


def test_trainings_are_timed_with_threads_that_wait_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[list[str], str | None]] = []

    class Process:
        """A process without the seconds that a fresh interpreter takes."""

        def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
            started.append((command, env.get("OMP_WAIT_POLICY")))
            self.forked = forked.start(command[1], *command[2:], out=tmp_path / f"{len(started)}.out")

        def wait(self) -> int:
            return self.forked.wait(300).returncode

    monkeypatch.setattr("drs.benchmarks.waiting.subprocess.Popen", Process)
    monkeypatch.setattr("drs.benchmarks.waiting.REPEATS", 1)
    monkeypatch.setattr("drs.benchmarks.waiting.WAITS", dict(list(WAITS.items())[:2]))
    small = ["data=digits", "model=mlp", "epochs=1", f"data.cache={tmp_path}"]
    rows = list(waiting_rows(small, {**os.environ, "OMP_WAIT_POLICY": "ACTIVE"}))
    assert [row.case[-11:] for row in rows] == ["1 at a time", "2 at a time"]
    assert all(row.tried and row.ours == "asleep at once" and row.ratio and row.ratio > 0 for row in rows)
    assert all("device=cpu" in command for command, _ in started)
    assert sorted(str(policy) for _, policy in started) == ["None"] * 3 + ["PASSIVE"] * 3
    with pytest.raises(RuntimeError, match="failed"):
        list(waiting_rows([*small, "epochs=none"], os.environ))
