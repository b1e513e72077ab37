"""Models packed into one batch against models trained one by one, and the rows of sweeps. No time is tested."""

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
from drs.benchmarks.packing import fit_packed, warm_up
from drs.benchmarks.sweeps import PACKED, WAYS, packing_rows, worker_rows
from drs.benchmarks.waiting import WAITS, waiting_rows
from drs.config import TrainConfig
from drs.data import LabelledImages
from drs.errors import UserError
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
    assert warm_up(configs, few, CPU, compiled=True) > 0
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
    plain, compiled = packing_rows(config, CPU)
    assert plain.ours == PACKED and compiled.ours.endswith("CUDA graph") and compiled.ratio is not None
    assert "s to compile" in compiled.note and "compile" not in plain.note
    torch.compiler.reset()
    compiled_with({"backend": _no_compiler})
    failed, plain = packing_rows(config, CPU)
    assert failed.verdict == "not measured" and failed.repeats == 0 and "no compiler here" in failed.note
    assert plain.ours == PACKED and plain.ratio is not None


def _no_compiler(*_: Any) -> Any:
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
    for name in ("fit", "fit_packed", "warm_up"):
        monkeypatch.setattr(f"drs.benchmarks.sweeps.{name}", note_down(name))
    rows = list(packing_rows(compose_train(*SMALL, *ALIKE), torch.device(device)))
    ways = len(WAYS[device])
    assert timed == [(1 + ways, {"warmup": warmup, "device": device})]
    assert [row.ratio for row in rows] == [1 / 2, 1 / 3][:ways] and {row.device for row in rows} == {device}
    assert [row.ours_median for row in rows] == [60.0, 40.0][:ways] and {row.theirs_median for row in rows} == {120.0}
    warm = [("warm_up", {"compiled": True})]
    runs = [("fit", {}), ("fit", {}), ("fit_packed", {"compiled": False}), ("fit_packed", {"compiled": True})]
    assert done == [*warm, *runs] if device == "cuda" else done == runs[:3]


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
