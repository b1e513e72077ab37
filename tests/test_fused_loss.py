"""The loss with its closed-form gradient against the same loss in plain operations."""

import functools
import itertools
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_losses import LargeTensors, random_case

from drs import fused_loss as module
from drs.fused_loss import FEW_ELEMENTS, _reads_gradient, chosen_form, fused_loss
from drs.losses import LOSSES, DRSoftmaxLoss, build_loss

SWITCHES = list(itertools.product(["non_label", "all_classes"], ["sum", "mean"]))


@pytest.fixture(autouse=True, params=["few calls", "few passes", "few passes, as on an accelerator"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one form of the loss whatever the size, and of its gradient whatever the device."""
    monkeypatch.setattr("drs.fused_loss.FEW_ELEMENTS", 2**62 if request.param == "few calls" else 0)
    if request.param.endswith("accelerator"):
        monkeypatch.setattr("drs.fused_loss._reads_gradient", lambda gradient: False)
    return str(request.param)


def value_and_gradient(function, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    leaf = logits.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize(("center", "reduction"), SWITCHES)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (5, 7), (64, 300)])
def test_it_is_the_plain_loss(center: str, reduction: str, batch: int, classes: int) -> None:
    logits, labels = random_case(batch, classes)
    loss = DRSoftmaxLoss(weight=0.3, ce_weight=1.7, center=center, reduction=reduction)
    found = value_and_gradient(lambda z: loss(z, labels), logits)
    expected = value_and_gradient(lambda z: loss.eager(z, labels), logits)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_is_as_exact_as_the_plain_loss(scale: float) -> None:
    """Against float64, where what is restrained is small beside the label's logit and where it is huge."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (200,), generator=generator)
    logits = (scale * torch.randn(200, 10, generator=generator)).scatter_add(
        1, labels[:, None], torch.full((200, 1), 20.0)
    )
    loss = DRSoftmaxLoss(weight=0.005)
    exact = value_and_gradient(lambda z: loss.eager(z, labels), logits.double())
    fused = value_and_gradient(lambda z: loss(z, labels), logits)
    plain = value_and_gradient(lambda z: loss.eager(z, labels), logits)
    for true, one, other in zip(exact, fused, plain, strict=True):
        bound = 4 * (other - true).abs().max() + 4e-7 * true.abs().max()
        assert (one - true).abs().max() <= bound


@pytest.mark.parametrize(("center", "reduction"), SWITCHES)
def test_it_can_be_differentiated_twice(center: str, reduction: str) -> None:
    logits, labels = random_case(3, 4)
    loss = DRSoftmaxLoss(weight=0.3, center=center, reduction=reduction)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, labels), logits.requires_grad_())


def test_an_outer_factor_reaches_the_gradient() -> None:
    logits, labels = random_case()
    loss = DRSoftmaxLoss(weight=0.3)
    once = value_and_gradient(lambda z: loss(z, labels), logits)[1]
    torch.testing.assert_close(value_and_gradient(lambda z: -2.5 * loss(z, labels), logits)[1], -2.5 * once)


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    logits, labels = random_case()
    value = DRSoftmaxLoss(weight=0.3)(logits.requires_grad_(), labels)
    first, second = (torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        assert torch.equal(logits.grad, times * first), "what is kept was changed along with the gradient"


def test_without_a_gradient_the_value_is_the_same() -> None:
    logits, labels = random_case()
    loss = DRSoftmaxLoss(weight=0.3)
    assert torch.equal(loss(logits, labels), value_and_gradient(lambda z: loss(z, labels), logits)[0])


def test_logits_that_are_not_contiguous() -> None:
    logits, labels = random_case(6, 8)
    loss = DRSoftmaxLoss(weight=0.3)
    expected = value_and_gradient(lambda z: loss(z, labels), logits)
    for view in (lambda z: z.t().contiguous().t(), lambda z: torch.stack([z, z], dim=2)[..., 0]):
        found = value_and_gradient(lambda z, view=view: loss(view(z), labels), logits)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_autocast_from_a_half_precision_layer() -> None:
    """The gradient arrives in the layer's own type; under autocast the loss itself stays in float32."""
    logits, labels = random_case(scale=1.0)
    low = logits.bfloat16()
    loss = DRSoftmaxLoss(weight=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(lambda z: loss(z, labels), low)
    expected_value, expected = value_and_gradient(lambda z: loss.eager(z.float(), labels), low)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected)


def test_per_sample_gradients_through_torch_func() -> None:
    logits, labels = random_case()
    loss = DRSoftmaxLoss(weight=0.3)
    loss.validate = False

    def one(row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return loss(row[None], label[None])

    found = torch.func.vmap(torch.func.grad(one))(logits, labels)
    expected = torch.stack(
        [value_and_gradient(lambda z, i=i: loss(z[None], labels[i : i + 1]), row)[1] for i, row in enumerate(logits)]
    )
    torch.testing.assert_close(found, expected)


def test_backward_builds_no_more_large_tensors_than_that_of_cross_entropy() -> None:
    logits = torch.randn(64, 50, requires_grad=True)
    labels = torch.randint(50, (64,))
    built = []
    for value in (F.cross_entropy(logits, labels), DRSoftmaxLoss()(logits, labels)):
        with LargeTensors(logits.numel()) as backward:
            torch.autograd.grad(value, logits)
        built.append(len(backward.storages))
    assert built[1] <= built[0]


def test_an_accelerator_is_not_waited_for() -> None:
    """A tensor on ``meta`` has no values, so that to read one is an error; an accelerator would be waited for."""
    logits = torch.empty(5, 7, device="meta", requires_grad=True)
    labels = torch.empty(5, dtype=torch.int64, device="meta")
    eager = DRSoftmaxLoss().eager
    value = fused_loss(logits, labels, ce_weight=1.7, weight=0.3, eager=lambda z: eager(z, labels))
    assert value.grad_fn is not None and value.grad_fn.name().startswith("_LossInFew")
    (-2.5 * value).backward()
    assert logits.grad is not None and logits.grad.shape == (5, 7)


def test_only_the_host_reads_the_gradient_at_once() -> None:
    assert _reads_gradient(torch.ones(())) and not _reads_gradient(torch.ones((), device="meta"))


def test_the_size_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drs.fused_loss.FEW_ELEMENTS", FEW_ELEMENTS)
    for batch, name in (
        (FEW_ELEMENTS // 8, "_LossInFewCallsBackward"),
        (FEW_ELEMENTS // 8 + 1, "_LossInFewPassesBackward"),
    ):
        logits, labels = torch.randn(batch, 8, requires_grad=True), torch.randint(8, (batch,))
        assert type(DRSoftmaxLoss()(logits, labels).grad_fn).__name__ == name


class _Kernel(module._LossInFewCalls):
    """Stands in for the form in Triton."""


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all tensors count as those of a card on which Triton's kernel runs."""
    monkeypatch.setattr(module, "_is_on_current_card", lambda logits, labels: True)
    monkeypatch.setattr(module, "_triton_form", lambda classes: _Kernel)


@pytest.mark.usefixtures("on_card")
def test_a_card_takes_the_kernel_for_what_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    assert chosen_form(logits, labels) is _Kernel
    assert chosen_form(logits[:, :2].contiguous().requires_grad_(), labels) is _Kernel
    for bad in (
        logits.double(), logits.bfloat16(), logits.t().contiguous().t(), logits[:, :3], logits[:, :1].contiguous(),
        logits[:3], logits[..., None], torch.nn.Parameter(logits),
    ):  # fmt: skip
        assert chosen_form(bad, labels) is not _Kernel
    for bad_labels in (labels.int(), labels[:3], labels[:, None], torch.zeros(8, dtype=torch.int64)[::2]):
        assert chosen_form(logits, bad_labels) is not _Kernel
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen_form(logits, labels) is not _Kernel


@pytest.mark.usefixtures("on_card")
def test_the_kernel_may_be_ruled_out_or_missing(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    expected = module._LossInFewCalls if form == "few calls" else module._LossInFewPasses
    monkeypatch.setattr(module, "_triton_form", lambda classes: None)
    assert chosen_form(logits, labels) is expected
    monkeypatch.setattr(module, "_triton_form", lambda classes: _Kernel)
    monkeypatch.setattr(module, "TRITON", False)
    assert chosen_form(logits, labels) is expected


@pytest.mark.usefixtures("on_card")
def test_a_card_leaves_an_empty_batch_and_transforms_to_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Kernel, "apply", None)
    loss = DRSoftmaxLoss()
    loss.validate = False
    assert loss(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).shape == ()
    logits, labels = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    expected = value_and_gradient(lambda z: loss.eager(z, labels), logits)[1]
    torch.testing.assert_close(torch.func.grad(loss)(logits, labels), expected)


@pytest.mark.parametrize("fault", ["no triton", "no kernel", "none"])
def test_a_kernel_that_does_not_run_is_not_taken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def probe(classes: int) -> None:
        assert classes == 10
        if fault == "no kernel":
            raise RuntimeError("Failed to find C compiler.\n Please specify it")

    stand_in = types.SimpleNamespace(LossInTriton=_Kernel, probe=probe)
    monkeypatch.setitem(sys.modules, "drs.triton_loss", None if fault == "no triton" else stand_in)
    ask = module._triton_form.__wrapped__  # beside what this process keeps
    if fault == "no kernel":
        with pytest.warns(UserWarning, match="without its Triton kernel: RuntimeError: Failed to find C compiler. Pl"):
            assert ask(10) is None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without Triton there is nothing to warn of
        assert ask(10) is (_Kernel if fault == "none" else None)


def test_a_cpu_asks_for_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_triton_form", None)
    monkeypatch.setattr(torch.cuda, "current_device", None)
    logits, labels = random_case()
    DRSoftmaxLoss()(logits.float().requires_grad_(), labels).backward()


def through_autograd(loss, logits, labels, phase):  # type: ignore[no-untyped-def]
    value = loss(logits, labels, phase)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("name", LOSSES)
def test_backpropagation_is_that_of_autograd_bit_for_bit(name: str) -> None:
    """Through a network with shared leaves, in both phases, and twice, so that gradients add up."""
    loss = build_loss(name)
    images, labels = random_case(9, 6)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = torch.linspace(-1, 1, 36, dtype=dtype).view(6, 6)
        found, expected = [weights.clone().requires_grad_() for _ in range(2)]
        for phase in [*range(loss.phases)] * 2:
            values = [
                function((images.to(dtype) @ leaf).tanh() * leaf.sum(), labels, phase)
                for function, leaf in (
                    (loss.backpropagate, found),
                    (functools.partial(through_autograd, loss), expected),
                )
            ]
            assert torch.equal(*values) and not values[0].requires_grad
        assert found.grad is not None and expected.grad is not None and found.grad.abs().sum() > 0
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize(("center", "reduction"), SWITCHES)
def test_backpropagation_heeds_the_switches(center: str, reduction: str) -> None:
    logits, labels = random_case(5, 7)
    loss = DRSoftmaxLoss(weight=0.3, ce_weight=1.7, center=center, reduction=reduction)
    leaf = logits.detach().requires_grad_()
    value = loss.backpropagate(leaf, labels)
    expected = value_and_gradient(lambda z: loss(z, labels), logits)
    assert torch.equal(value, expected[0]) and leaf.grad is not None and torch.equal(leaf.grad, expected[1])


def test_backpropagation_asks_autograd_only_where_it_must(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few calls, autograd does not see the loss; in few passes, under autocast and for an empty batch it does."""
    logits, labels = random_case(5, 7)
    loss = DRSoftmaxLoss()
    forwards: list[str] = []
    for taken in (module._LossInFewCalls, module._LossInFewPasses):
        monkeypatch.setattr(
            taken, "apply", lambda *_, name=taken.__name__, made=taken.apply: forwards.append(name) or made(*_)
        )
    leaf = logits.float().requires_grad_()
    loss.backpropagate(leaf, labels)
    assert forwards == ([] if form == "few calls" else ["_LossInFewPasses"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forwards.clear()
        under_autocast = loss.backpropagate(leaf, labels)
        assert len(forwards) == 1
    assert under_autocast.dtype == torch.float32 and torch.equal(under_autocast, loss(leaf, labels).detach())
    loss.validate = False
    empty = torch.empty(0, 7, requires_grad=True)
    assert loss.backpropagate(empty, labels[:0]).isnan() and empty.grad is not None


class Halved(DRSoftmaxLoss):
    """Another loss than the one whose derivative is known."""

    def compute(self, logits: torch.Tensor, labels: torch.Tensor, phase: int) -> torch.Tensor:
        return 0.5 * super().compute(logits, labels, phase)


def test_backpropagation_leaves_another_loss_to_autograd() -> None:
    logits, labels = random_case(5, 7)
    leaf, same = (logits.detach().clone().requires_grad_() for _ in range(2))
    value = Halved().backpropagate(leaf, labels)
    assert torch.equal(value, through_autograd(Halved(), same, labels, 0))
    assert leaf.grad is not None and same.grad is not None and torch.equal(leaf.grad, same.grad)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        DRSoftmaxLoss().backpropagate(leaf, labels)


def test_backpropagation_refuses_what_the_loss_refuses() -> None:
    logits, labels = random_case(5, 7)
    for bad in (labels + 7, labels.double(), labels[:4]):
        with pytest.raises(ValueError, match="labels? "):
            DRSoftmaxLoss().backpropagate(logits.requires_grad_(), bad)
    with pytest.raises(RuntimeError, match="does not require grad"):
        DRSoftmaxLoss().backpropagate(logits.detach(), labels)
