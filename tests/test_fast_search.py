"""Attacks that search on a stand-in of the model and in TF32: the search alone does, and cells and report say so."""

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import compose_train
from test_attacks import PGD, linear_problem
from torch import Tensor, nn

from drs.attack_config import ATTACK_SCHEMAS, L2_ONLY, PGDConfig, ProjectedConfig, SanityConfig
from drs.attacks import build_attack, run_attack, running
from drs.attacks import stand_in as stand_in_module
from drs.attacks.stand_in import stand_in
from drs.cells import Cell, plan_cells
from drs.filling import fill_cell
from drs.models import build_model
from drs.report_text import scoring_section
from drs.runs import RunFolder
from drs.suite_config import Epsilon, SuiteConfig

SUITE = SuiteConfig(
    "tiny", {"pgd": PGDConfig("pgd", "linf", steps=2)}, {"digits": {"linf": [0.1]}}, {"default": 20},
    sanity=SanityConfig(n_samples=20, steps=2, restarts=1),
)  # fmt: skip


class Watched(nn.Module):
    """A model that notes, for each pass, whether it may be in TF32 and whether a gradient is asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        assert len(allowed) == 1, "convolutions and products are in the same precision"
        self.passes.append((allowed.pop(), torch.is_grad_enabled() and images.requires_grad))
        return self.model(images)


@pytest.mark.parametrize("fast", [False, True])
def test_only_the_search_is_in_tf32_and_only_where_it_is_asked_for(fast: bool) -> None:
    linear, images, labels = linear_problem(classes=3)
    model = Watched(linear).eval()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    run_attack(build_attack(PGD), model, images, labels, epsilon=0.02, fast_search=fast)
    assert {allowed for allowed, searching in model.passes if searching} == {fast}
    judged = [allowed for allowed, searching in model.passes if not searching]
    assert judged[-1 - fast] is False, "what is judged is float32"
    assert judged.count(True) == fast, "what has fooled the stand-in is asked in the precision of the search"
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_cells_of_a_fast_search_have_names_of_their_own_but_for_those_that_do_not_search(tmp_path: Path) -> None:
    train = compose_train("data=digits", "model=mlp")
    run = RunFolder(tmp_path / "run")
    plain, fast = (plan_cells(run, replace(SUITE, fast_search=fast), {run: train}) for fast in (False, True))
    same = {one.attack for one, other in zip(plain, fast, strict=True) if one.path == other.path}
    assert same == {"clean"}
    assert {cell.attack for cell in fast if cell.fast_search} == {"pgd", "sanity"}


@pytest.mark.parametrize("kind", ATTACK_SCHEMAS)
def test_only_an_attack_that_sees_labels_searches_on_the_model(tmp_path: Path, kind: str) -> None:
    norm = "l2" if kind in L2_ONLY else "linf"
    suite = replace(SUITE, attacks={"it": ATTACK_SCHEMAS[kind](kind, norm)}, fast_search=True)
    suite = replace(suite, epsilons={"digits": {"linf": [0.1], "l2": [0.1]}})
    train = compose_train("data=digits", "model=mlp", "loss=ce")
    run, twin = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "twin")
    cells = plan_cells(run, suite, {run: train, twin: replace(train, seed=1)})
    (found,) = {(cell.fast_search, cell.replay) for cell in cells if cell.attack == "it"}
    assert found == (kind != "hop_skip_jump", True)


@pytest.mark.parametrize("fast", [False, True])
def test_a_cell_is_computed_as_it_says(tmp_path: Path, digits_model: nn.Module, fast: bool) -> None:
    train = compose_train("data=digits", "model=mlp", f"data.cache={tmp_path}/data")
    model = Watched(digits_model).eval()
    config = PGDConfig("pgd", "linf", steps=2)
    cell = Cell(
        RunFolder(tmp_path / "run"),
        train,
        "pgd",
        config,
        Epsilon(0.1, "0.1"),
        20,
        20,
        tmp_path / "a.npz",
        fast_search=fast,
    )
    fill_cell(cell, model, torch.device("cpu"))
    assert {allowed for allowed, searching in model.passes if searching} == {fast}


def test_report_says_that_attacks_searched_on_stand_ins() -> None:
    assert "TF32" in scoring_section({"fast_search": True}, {})
    assert "searched" not in scoring_section({}, {})


def normalised(name: str, **options: float) -> nn.Module:
    """Return an untrained network whose batch normalisations have statistics of their own."""
    torch.manual_seed(0)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    model = build_model(name, num_classes=10, channels=3, size=32, mean=mean, std=std, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor, low in (
                (module.weight.data, 0.5), (module.bias.data, -0.5), (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):  # fmt: skip
                tensor.uniform_(low, 1.5)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(("name", "options"), [("smallcnn", {"width": 4}), ("resnet9", {"width": 4}), ("resnet18", {})])
def test_stand_in_is_the_same_function_without_batch_normalisation(name: str, options: dict[str, float]) -> None:
    model = normalised(name, **options)
    images = torch.rand(8, 3, 32, 32)
    found = stand_in(model, images)
    assert found is not model and not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), "the model is left alone"
    with torch.no_grad():
        one, other = (copy.deepcopy(each).double()(images.double()) for each in (found, model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert all(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in found.parameters() if weight.dim() == 4
    )


def test_stand_in_is_kept_while_the_model_stays_as_it_is() -> None:
    model, images = normalised("smallcnn", width=4), torch.rand(8, 3, 32, 32)
    first = stand_in(model, images)
    assert stand_in(model, images) is first
    with torch.no_grad():
        model[1][-1].bias[0] += 1  # type: ignore[index, operator]
    second = stand_in(model, images)
    assert second is not first and not torch.equal(second(images), first(images))
    model[1][-1].bias.data[0] += 1  # type: ignore[index, operator, union-attr]
    assert stand_in(model, images) not in (first, second), "also where PyTorch counts no change"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class ByCount(nn.Module):
    """Has a batch normalisation, and treats one image otherwise than several."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def factor(self, images: Tensor) -> float:
        return 2.0 if len(images) > 1 else 1.0

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * self.factor(images)


class ByHand(ByCount):
    """Its factor is fixed when it is traced."""

    def factor(self, images: Tensor) -> float:
        return 2.0 if isinstance(images, torch.fx.Proxy) or len(images) > 1 else 1.0


def test_shortage_of_memory_is_not_taken_for_a_model_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(_: nn.Module) -> nn.Module:
        raise torch.OutOfMemoryError("none left")

    model, images = normalised("smallcnn", width=4), torch.rand(2, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr("drs.attacks.stand_in.fuse", fuse)
        with pytest.raises(torch.OutOfMemoryError):
            stand_in(model, images)
    assert stand_in(model, images) is not model


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), ByCount(), ByHand()])
def test_model_that_has_nothing_to_fold_or_cannot_be_traced_stands_in_for_itself(model: nn.Module) -> None:
    assert stand_in(model.eval(), torch.rand(9, 1, 4, 4)) is model


def test_fast_search_asks_the_stand_in_and_finds_what_a_search_on_the_model_does() -> None:
    model, images = normalised("smallcnn", width=4), torch.rand(20, 3, 32, 32)
    with torch.no_grad():
        model[1][-1].bias -= model(images).mean(dim=0)  # type: ignore[index, operator]
    labels = model(images).argmax(dim=1)
    attack = build_attack(replace(PGD, steps=5))
    passes: list[bool] = []
    watch = model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].requires_grad))
    found = run_attack(attack, model, images, labels, epsilon=0.002, fast_search=True)
    watch.remove()
    assert not any(passes), "no gradient comes from the model"
    expected = run_attack(attack, model, images, labels, epsilon=0.002)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    fooled = int((expected.logits.argmax(dim=1) != labels).sum())
    assert fooled in range(1, 20)


def test_what_fools_the_stand_in_alone_is_attacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose first class is favoured gives images of other classes up long before the model is fooled."""
    model, images, labels = linear_problem(classes=3)
    favoured = copy.deepcopy(model)
    with torch.no_grad():
        favoured[-1].bias[0] += 1.0  # type: ignore[index, operator]
    asked: list[int] = []
    watch = model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0]) * inputs[0].requires_grad))
    config = ProjectedConfig("projected", "linf", steps=10, objectives=["margin"], restarts=1)
    exact = run_attack(build_attack(config), model, images, labels, epsilon=0.05)
    asked.clear()
    monkeypatch.setattr(running, "stand_in", lambda *_: favoured)
    found = run_attack(build_attack(config), model, images, labels, epsilon=0.05, fast_search=True)
    watch.remove()
    fooled = [outcome.logits.argmax(dim=1) != labels for outcome in (exact, found)]
    assert fooled[0].any() and torch.equal(*fooled)
    assert max(asked) in range(1, len(images)), "only what was given up too early"


class Rounded(nn.Module):
    """A stand-in whose last bits depend on the batch: the fewer images, the sooner it is fooled."""

    def __init__(self, model: nn.Module, whole: int) -> None:
        super().__init__()
        self.model, self.whole = model, whole

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        low, high = torch.aminmax(logits.detach(), dim=1, keepdim=True)
        share = 0.0018 * (1 - len(images) / self.whole)
        return logits - share * (high - low) * torch.nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1])


def test_what_the_search_gave_up_by_its_rounding_is_attacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = linear_problem(classes=3, n=200)
    config = ProjectedConfig("projected", "linf", steps=40, relative_step_size=0.1, objectives=["margin"], restarts=1)
    standing = {}
    for near in (0.0, stand_in_module.NEAR):
        monkeypatch.setattr(stand_in_module, "NEAR", near)
        monkeypatch.setattr(running, "stand_in", lambda *_: Rounded(model, len(images)).eval())
        found = run_attack(build_attack(config), model, images, labels, epsilon=0.005, fast_search=True)
        standing[near] = int((found.logits.argmax(dim=1) == labels).sum())
    exact = run_attack(build_attack(config), model, images, labels, epsilon=0.005)
    expected = int((exact.logits.argmax(dim=1) == labels).sum())
    assert standing[stand_in_module.NEAR] == expected < standing[0.0]
