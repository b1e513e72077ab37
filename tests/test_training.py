"""Training: repeatability, divergence, what a run folder holds, and what happens when it is damaged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import compose_train
from torch import nn

from drs.checkpoints import load_weights
from drs.config import TrainConfig
from drs.data import LabelledImages
from drs.errors import DivergedError, UserError
from drs.optimisation import build_optimizer, build_schedule
from drs.runs import finished_runs, iterate_runs, run_folder, study_folder
from drs.training import fit, train

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
CPU = torch.device("cpu")


def small(tmp_path: Path, *overrides: str) -> TrainConfig:
    """A training of a second or less, with its own results and cache."""
    return compose_train(
        "data=digits", "model=mlp", "epochs=2", "batch_size=64", f"results_dir={tmp_path}/results",
        f"data.cache={tmp_path}/data", "progress=false", *overrides,
    )  # fmt: skip


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    "overrides", [["loss=dr_softmax"], ["loss=cot", "optim=sgd"], ["loss=logit_squeezing", "loss.noise_std=0.1"]]
)
def test_seed_repeats_a_run_bit_for_bit_and_another_seed_does_not(
    tmp_path: Path, digits: Digits, overrides: list[str]
) -> None:
    config = small(tmp_path, "data.augment=crop_flip", "data.padding=1", *overrides)
    first, rows = fit(config, digits[0], digits[1], CPU)
    torch.rand(3)  # what ran before must not matter
    second, again = fit(config, digits[0], digits[1], CPU)
    other, _ = fit(replace(config, seed=1), digits[0], digits[1], CPU)
    assert torch.equal(weights(first), weights(second))
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in again]
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize(
    "loss", ["ce", "dr_softmax", "label_smoothing", "gce", "cot", "logit_squeezing", "confidence_penalty"]
)
def test_every_loss_learns_the_digits(tmp_path: Path, digits: Digits, loss: str) -> None:
    config = small(tmp_path, f"loss={loss}", "epochs=15")
    _, rows = fit(config, digits[0], digits[1], CPU)
    assert rows[-1]["val_accuracy"] > 0.85


def test_bfloat16_learns(tmp_path: Path, digits: Digits) -> None:
    _, rows = fit(small(tmp_path, "precision=bfloat16", "epochs=10"), digits[0], digits[1], CPU)
    assert rows[-1]["val_accuracy"] > 0.85


def test_run_folder_holds_what_it_should_and_a_second_call_skips(tmp_path: Path) -> None:
    config = small(tmp_path, "study=s", "loss.weight=0.001")
    result = train(config)
    folder = Path(result.folder)
    assert result.state == "done"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.safetensors", "config.yaml", "metrics.csv", "status.json",
    ]  # fmt: skip
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["epoch"].tolist() == [1, 2]
    assert metrics.notna().all().all()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "done"
    assert status["train_seconds"] == pytest.approx(metrics["seconds"].sum())
    assert run_folder(config).config() == config
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train(config).state == "skipped"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_saved_model_is_the_trained_one(tmp_path: Path, digits: Digits) -> None:
    config = small(tmp_path)
    train(config)
    trained, _ = fit(config, digits[0], digits[1], CPU)
    loaded = run_folder(config).load_model(CPU)
    images = digits[2].pixels()
    assert torch.equal(loaded(images), trained(images))
    assert not any(module.training for module in loaded.modules())


def test_diverged_training_is_recorded_with_its_epoch_and_is_no_model(tmp_path: Path, digits: Digits) -> None:
    config = small(tmp_path, "study=s", "loss.weight=1e30", "optim=sgd", "optim.learning_rate=100")
    with pytest.raises(DivergedError) as caught:
        fit(config, digits[0], digits[1], CPU)
    assert not math.isfinite(caught.value.value)
    result = train(config)
    assert result.state == "diverged"
    status = run_folder(config).status()
    assert (status["state"], status["reason"], status["epoch"]) == ("failed", "diverged", caught.value.epoch)
    assert status["step"] == caught.value.step
    assert not (run_folder(config).path / "checkpoint.safetensors").exists()
    again = train(config)
    assert (again.state, again.detail[:15]) == ("diverged", "diverged before")
    with pytest.raises(UserError, match=r"no finished run .* \(1 failed\)"):
        finished_runs(study_folder(config.results_dir, "s"))


def test_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    narrow, wide = small(tmp_path, "model.options.width=16"), small(tmp_path, "model.options.width=32")
    for config in (narrow, wide):
        train(config)
    source, target = (run_folder(config).path / "checkpoint.safetensors" for config in (narrow, wide))
    target.write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: has \d+ bytes, but"):
        run_folder(wide).load_model(CPU)
    run_folder(wide).write_status(state="done")  # vouches for nothing, as before there were digests
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: holds the weights of mlp, .*tensors differ"):
        run_folder(wide).load_model(CPU)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    config = small(tmp_path)
    train(config)
    folder = run_folder(config)
    checkpoint = folder.path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: has \d+ bytes, but"):
        folder.load_model(CPU)
    folder.write_status(state="done")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: not a whole safetensors file"):
        folder.load_model(CPU)
    checkpoint.unlink()
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: is missing"):
        load_weights(nn.Linear(1, 1), checkpoint, "linear")
    (folder.path / "status.json").write_text("{")
    with pytest.raises(UserError, match=r"status\.json: not JSON"):
        folder.status()
    (folder.path / "config.yaml").write_text("study: x\nepoch: 3\n")
    with pytest.raises(UserError, match=r"config\.yaml: "):
        folder.config()


def test_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size=5000: must be at most the 1197 training samples"):
        train(small(tmp_path, "batch_size=5000", "study=s"))
    assert not list(iterate_runs(study_folder(f"{tmp_path}/results", "s")))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1.0, 50: 1.0, 99: 1.0}),
        ("cosine", {0: 1.0, 50: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 0.99))}),
        ("one_cycle", {0: 1 / 20, 9: 0.5, 19: 81 / 81 * 80 / 81 + 1 / 81, 99: 1 / 81}),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, expected: dict[int, float]) -> None:
    config = small(tmp_path, "optim=sgd", f"optim.schedule={schedule}", "optim.learning_rate=2.0").optim
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    steps = build_schedule(optimizer, config, 100)
    found = []
    for _ in range(100):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        steps.step()
    for step, value in expected.items():
        assert found[step] == pytest.approx(value), step
    assert max(found) <= 1.0
    assert min(found) > 0


def test_optimizers_are_the_configured_ones(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer(model, small(tmp_path, f"optim={name}", "optim.weight_decay=0.25").optim)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizers_step_as_their_plain_forms_do(tmp_path: Path, name: str, layout: torch.memory_format) -> None:
    """They update parameters as raw memory, in which a gradient in another layout would be mixed up."""
    config = small(tmp_path, f"optim={name}", "optim.weight_decay=0.25", "optim.learning_rate=0.01").optim
    images = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    trained = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = build_optimizer(model, config)
        for group in optimizer.param_groups:
            group["fused"] = group["fused"] and not plain
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        trained.append(weights(model))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)
