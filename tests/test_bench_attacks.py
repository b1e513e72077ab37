"""The attacks and the paper suite beside other libraries, on the smallest real work. No time is tested."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from drs.attack_config import AttackConfig, CWConfig, CWTorchattacksConfig, FGSMConfig, PGDConfig
from drs.attacks import build_attack, climbing, run_attack
from drs.attacks.contract import CleanLogits
from drs.attacks.isolation import watch_gradient
from drs.benchmarks.attacks import attack_rows, count_looks, look_rows, ways_to_look
from drs.benchmarks.harness import Machine, Row
from drs.benchmarks.peers import MODULES, PEERS, STEPS, Perturb
from drs.benchmarks.suites import suite_rows
from drs.data import LabelledImages
from drs.errors import UserError

Digits = tuple[LabelledImages, LabelledImages, LabelledImages]
Contest = Callable[..., list[Row]]
MACHINE = Machine(gigaflops=50.0, gigabytes=10.0)


@pytest.fixture
def contest(digits: Digits, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Contest:
    """Return what makes the rows of the attacks on forty digits, each attack run once; ART counts as missing."""
    monkeypatch.setattr("drs.benchmarks.attacks.REPEATS", 1)
    monkeypatch.setitem(MODULES, "ART", "no_such_package.at_all")
    images, labels = digits[2].pixels(torch.arange(40)), digits[2].labels[:40]

    def rows(target: str = ">= 3") -> list[Row]:
        return list(attack_rows(digits_model, images, labels, 0.2, MACHINE, described="mlp", target=target))

    return rows


def operations_of_a_pass(model: nn.Module) -> int:
    """Count those of the matrix products of a perceptron, there and back to one image."""
    return sum(2 * 2 * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def test_attack_rows_say_who_is_stronger(
    contest: Contest, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = contest()
    assert [row.ours for row in rows] == 3 * ["our PGD"] + 3 * ["our margin PGD"]
    assert [row.theirs for row in rows] == 2 * list(PEERS)
    measured = [row for row in rows if row.theirs != "ART"]
    assert all(row.ratio is not None and "torchattacks" in row.note and "foolbox" in row.note for row in measured)
    assert sum(row.target == ">= 3" for row in rows) == 2 and not any(row.target for row in rows if row.theirs == "ART")
    assert all(row.ratio is None and "[bench]" in row.note for row in rows if row.theirs == "ART")
    assert measured[-1].note.startswith("no weaker") and measured[-1].held

    # An attack that leaves its images alone is fast, and its rows say that this is not what was asked.
    def look_on(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        model(images.clone().requires_grad_())
        return images

    monkeypatch.setattr("drs.benchmarks.attacks._ours", lambda _: look_on)
    idle = [row for row in contest(">= 0") if row.target]
    assert len(idle) == 2 and all(row.ratio is not None and row.verdict == "missed" for row in idle)
    assert all(row.reason.startswith("It leaves more images standing") for row in idle)


def test_floor_of_an_attack_is_its_arithmetic_and_our_pass_is_called_what_it_is(
    contest: Contest, digits_model: nn.Module
) -> None:
    for row in contest():
        if row.ratio is None:
            continue
        assert row.least is not None
        looks = 1e9 * MACHINE.gigaflops / (row.least * operations_of_a_pass(digits_model))
        assert 1 < looks < STEPS and 40 * looks == pytest.approx(round(40 * looks))
        assert row.floor.startswith(f"{looks:.1f} of {STEPS} looks an image remain")
        assert row.ours_median < row.least  # type: ignore[operator]
        found = re.search(r"\(([\d.e-]+) ms an image, ([\d.e+]+) times its arithmetic\) the ratio would be", row.reason)
        assert found, row.reason
        milliseconds, times = map(float, found.groups())
        arithmetic = operations_of_a_pass(digits_model) / (1e6 * MACHINE.gigaflops)
        assert milliseconds / arithmetic == pytest.approx(times, rel=0.02)
        assert f"looks {STEPS / looks:.3g} times as often ({STEPS} times, we {looks:.1f})" in row.reason


def test_without_a_peer_nothing_is_measured_and_the_target_stands(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PEERS:
        monkeypatch.setitem(MODULES, name, "no_such_package.at_all")
    rows = contest()
    assert [row.theirs for row in rows] == 2 * list(PEERS)
    assert all(row.verdict == "not measured" and row.ours_median and "not installed" in row.note for row in rows)
    assert [row.target for row in rows] == 2 * [">= 3", "", ""]


def failing(at_call: int, calls: list[int]) -> Perturb:
    """Return an attack that leaves its images alone, notes its calls and raises from a certain one on."""

    def perturb(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        calls.append(len(images))
        if len(calls) >= at_call:
            raise RuntimeError("out of\n luck")
        return images

    return perturb


@pytest.mark.parametrize("at_call", [1, 2])
def test_peer_that_raises_costs_its_own_rows(at_call: int, contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(PEERS, "torchattacks", failing(at_call, calls))
    rows = contest()
    assert len(calls) == at_call  # what has failed is not tried again
    for row in rows:
        if row.theirs == "torchattacks":
            assert row.verdict == "not measured" and not row.target
            assert row.note == "torchattacks failed with RuntimeError: out of luck"
        elif row.theirs == "foolbox":
            assert row.ratio is not None and row.target and "torchattacks" not in row.note
    assert len(rows) == 6


def test_peer_that_cannot_be_imported_costs_its_own_rows(
    contest: Contest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_peer").mkdir()
    (tmp_path / "broken_peer" / "__init__.py").write_text("raise AttributeError('numpy has no float')")
    monkeypatch.syspath_prepend(tmp_path)

    def perturb(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        __import__("broken_peer.attacks")
        return images

    monkeypatch.setitem(MODULES, "ART", "broken_peer.attacks")
    monkeypatch.setitem(PEERS, "ART", perturb)
    notes = {row.note for row in contest() if row.theirs == "ART"}
    assert notes == {"ART failed with AttributeError: numpy has no float"}


def test_peers_have_our_precision_and_seed_without_our_watch(
    contest: Contest, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: dict[str, set[tuple[bool, int, bool, bool]]] = {"ours": set(), "theirs": set()}

    def recording(whose: str) -> Perturb:
        def perturb(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
            watched = watch_gradient in model._forward_pre_hooks.values()
            seen[whose].add((torch.backends.cudnn.allow_tf32, torch.initial_seed(), model.training, watched))
            model(images.clone().requires_grad_())
            return images

        return perturb

    monkeypatch.setitem(PEERS, "foolbox", recording("theirs"))
    monkeypatch.setattr("drs.benchmarks.attacks._ours", lambda _: recording("ours"))
    contest()
    assert seen["theirs"] == {(False, 0, False, False)}
    assert (False, 0, False, True) in seen["ours"]
    assert torch.backends.cudnn.allow_tf32 and all(parameter.requires_grad for parameter in digits_model.parameters())


def test_looks_are_tried_otherwise_and_onednn_on_a_cpu_alone(
    digits: Digits, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drs.benchmarks.attacks.REPEATS", 1)
    images, labels = digits[2].pixels(torch.arange(40)), digits[2].labels[:40]
    tried = list(look_rows(digits_model, images, labels, described="mlp"))
    assert len(tried) == 3 and all(row.tried and row.ratio is not None for row in tried)
    assert [row.ours for row in tried if "oneDNN" in row.ours] == ["without oneDNN"]
    on_a_card = ways_to_look(digits_model, images, labels, "cuda")
    assert list(on_a_card) == [row.ours for row in tried if "oneDNN" not in row.ours]


def test_looks_are_gradients_asked_for(digits_model: nn.Module) -> None:
    images = torch.rand(6, 1, 8, 8)

    def some() -> None:
        digits_model(images)
        digits_model(images[:4].clone().requires_grad_())
        with torch.no_grad():
            digits_model(images.clone().requires_grad_())

    assert count_looks(digits_model, some) == 4
    assert not digits_model._forward_pre_hooks


SUITE: dict[str, AttackConfig] = {
    "fgsm": FGSMConfig("fgsm", "linf"),
    "pgd": PGDConfig("pgd", "linf", steps=2, relative_step_size=0.25, random_start=False),
    "cw_torchattacks": CWTorchattacksConfig("cw_torchattacks", "l2", steps=3),
    "cw": CWConfig("cw", "l2"),
}


def rows_of_suite(digits: Digits, model: nn.Module) -> list[Row]:
    return list(
        suite_rows(
            model, digits[2].pixels(torch.arange(40)), digits[2].labels[:40], SUITE, [0.1, 0.3], 20, MACHINE,
            described="mlp", target=">= 2",
        )
    )  # fmt: skip


def test_the_suite_and_the_same_attacks_by_hand_find_the_same(digits: Digits, digits_model: nn.Module) -> None:
    row, *tried = rows_of_suite(digits, digits_model)
    for each in (row, *tried):
        pairs = re.findall(r"(fgsm|pgd) at ([\d.]+) ([\d.]+) and ([\d.]+) %", each.note)
        assert [(name, epsilon) for name, epsilon, *_ in pairs] == [
            ("fgsm", "0.1"), ("fgsm", "0.3"), ("pgd", "0.1"), ("pgd", "0.3"),
        ]  # fmt: skip
        assert all(one == other for _, _, one, other in pairs) and len({one for _, _, one, _ in pairs}) > 1
        assert re.search(r"cw_torchattacks ([\d.]+) and \1 %", each.note)
    assert "without cw, which torchattacks does not have" in row.note
    assert not row.tried and row.target and len(tried) == 2
    assert all(each.tried and each.ratio is not None and not each.target for each in tried)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in digits_model.parameters())


def test_floor_of_the_suite_is_the_arithmetic_of_its_steps(digits: Digits, digits_model: nn.Module) -> None:
    row, *_ = rows_of_suite(digits, digits_model)
    images, labels = digits[2].pixels(torch.arange(40)), digits[2].labels[:40]
    right = int((digits_model(images).argmax(dim=1) == labels).sum())
    # Two of FGSM, four of PGD, three of CW; four of them at the clean image, three of which are not needed.
    steps = (2 * 1 + 2 * 2 + 3 - 3) * right
    assert row.least == pytest.approx(steps * operations_of_a_pass(digits_model) / (1e9 * MACHINE.gigaflops))
    assert row.least < row.ours_median  # type: ignore[operator]
    assert f"{(2 * 1 + 2 * 2 + 3) * right / 40:.1f} gradients an image, and 9.0 are asked for by hand" in row.reason


def test_by_hand_has_our_precision(digits: Digits, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    watch = digits_model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    try:
        rows_of_suite(digits, digits_model)
    finally:
        watch.remove()
    assert seen and not any(seen)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw_torchattacks"])
def test_shared_clean_logits_change_no_number(name: str, digits: Digits, digits_model: nn.Module) -> None:
    images, labels = digits[2].pixels(torch.arange(90)), digits[2].labels[:90]
    asked = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal asked
        asked += not torch.is_grad_enabled()

    watch = digits_model.register_forward_pre_hook(count)
    clean = CleanLogits(digits_model, images)
    passes = []
    try:
        for epsilon in (0.1, 0.2):
            outcomes = []
            for given in (None, clean):
                asked = 0
                arguments = {"epsilon": epsilon, "batch_size": 40, "clean": given}
                outcomes.append(run_attack(build_attack(SUITE[name]), digits_model, images, labels, **arguments))  # type: ignore[arg-type]
                passes.append(asked)
            alone, shared = outcomes
            assert torch.equal(alone.logits, shared.logits) and torch.equal(alone.distance, shared.distance)
            assert (alone.logits.argmax(dim=1) != labels).any()
    finally:
        watch.remove()
    # The checks are two passes, the clean images three batches, and so are the adversarial ones.
    assert passes == [2 + 3 + 3, 3 + 3, 2 + 3 + 3, 3]


def test_shared_clean_logits_are_checked_as_others_are(digits: Digits, digits_model: nn.Module) -> None:
    images, labels = digits[2].pixels(torch.arange(40)), digits[2].labels[:40]
    attack = build_attack(SUITE["fgsm"])
    clean = CleanLogits(digits_model, images)
    with pytest.raises(UserError, match="probabilities"):
        CleanLogits(nn.Sequential(digits_model, nn.Softmax(dim=1)).eval(), images)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        CleanLogits(digits_model, 255 * images)
    with pytest.raises(UserError, match="training mode"):
        CleanLogits(nn.Sequential(digits_model, nn.Dropout()).train(), images)
    for model, others in ((nn.Sequential(digits_model).eval(), images), (digits_model, images.clone())):
        with pytest.raises(ValueError, match="of another model or of other images"):
            run_attack(attack, model, others, labels, epsilon=0.1, clean=clean)
    with pytest.raises(UserError, match="epsilon"):
        run_attack(attack, digits_model, images, labels, epsilon=8, clean=clean)
    digits_model.train()
    try:
        with pytest.raises(UserError, match="training mode"):
            run_attack(attack, digits_model, images, labels, epsilon=0.1, clean=clean)
    finally:
        digits_model.eval()

    class BrokenBeyondTheProbes(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = digits_model(images)
            return logits.masked_fill((torch.arange(len(logits)) == 30).unsqueeze(1), torch.nan)

    broken = BrokenBeyondTheProbes().eval()
    with pytest.raises(UserError, match="clean images: 1 of 40 samples have logits that are not finite"):
        run_attack(attack, broken, images, labels, epsilon=0.1, clean=CleanLogits(broken, images))


@pytest.mark.parametrize(
    ("values", "broken"),
    [([1.0, -1.0], 0), ([3e38, 3e38], 0), ([-3e38, -3e38], 0), ([torch.inf, 1.0], 1), ([torch.inf, -torch.inf], 1),
     ([torch.nan, 3e38], 1)],
)  # fmt: skip
def test_gradient_is_judged_by_its_values_and_not_by_their_sum(values: list[float], broken: int) -> None:
    images = torch.zeros(3, 1, 1, 2, requires_grad=True)
    watch_gradient(nn.Identity(), (images,))
    gradient = torch.zeros(3, 1, 1, 2)
    gradient[1, 0, 0] = torch.tensor(values)
    if not broken:
        (1 * images).backward(gradient)
        assert images.grad is not None and torch.equal(images.grad, gradient)
        return
    with pytest.raises(UserError, match=f"gradient is not finite for {broken} of 3 images"):
        (1 * images).backward(gradient)


def test_floor_drops_at_once_what_an_accelerator_keeps_for_a_while(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = climbing.room_for
    at_once = contest()
    monkeypatch.setattr(climbing, "room_for", lambda standing, _: room(standing, "cuda"))
    later = contest()
    assert later[0].floor == at_once[0].floor, "in words, with the looks of a drop at once"
    looks = [float(re.search(r"we ([\d.]+)\)", row.reason)[1]) for rows in (at_once, later) for row in rows[:1]]  # type: ignore[index]
    assert looks[1] > looks[0] and not climbing.DROP_AT_ONCE
