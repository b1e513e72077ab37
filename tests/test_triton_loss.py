"""The form of the loss in Triton against float64: in Triton's interpreter, and on a card where there is one.

The interpreter runs a kernel with NumPy on a CPU. It has to be asked for before Triton is imported, so that a test here
starts it as a process of its own, on this same file.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from drs import fused_loss
from drs.losses import DRSoftmaxLoss

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parent.parent
CASES = [(1, 2), (700, 3), (300, 10), (5, 1000), (2, 2049), (3, 4097), (2, 9001)]
"""Batch and classes: rows whole and in blocks; rows that do not fill the programs, and classes that fill no blocks."""

on_card = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a card")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where the kernel runs: on a CPU in the interpreter, else on a card."""
    if INTERPRETED:
        from drs.triton_loss import LossInTriton

        monkeypatch.setattr(fused_loss, "_is_on_current_card", lambda logits, labels: True)
        monkeypatch.setattr(fused_loss, "_triton_form", lambda classes: LossInTriton)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a card, or the interpreter")
    return "cuda"


def random_case(batch: int, classes: int, device: str, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 logits and labels, of which the first is 0 and the last K-1."""
    generator = torch.Generator().manual_seed(batch + classes)
    logits = scale * torch.randn(batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[0], labels[-1] = 0, classes - 1
    return logits.to(device), labels.to(device)


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_exact(loss: DRSoftmaxLoss, logits: torch.Tensor, labels: torch.Tensor, factor: float = 1.0) -> None:
    """Check value and gradient of a multiple of a loss in Triton against float64, relative to the largest entry."""
    value = loss(logits.detach().requires_grad_(), labels)
    assert type(value.grad_fn).__name__ == "LossInTritonBackward"
    found = value_and_gradient(lambda z: factor * loss(z, labels), logits)
    exact = value_and_gradient(lambda z: factor * loss.eager(z, labels), logits.double())
    for one, true in zip(found, exact, strict=True):
        assert one.dtype == torch.float32 and one.shape == true.shape
        assert (one - true).abs().max() <= 5e-6 * true.abs().max()


@pytest.mark.parametrize(("batch", "classes"), CASES)
def test_backpropagation_takes_the_kernel_and_no_autograd(
    device: str, batch: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = random_case(batch, classes, device)
    loss = DRSoftmaxLoss(weight=0.3, ce_weight=1.7)
    expected = value_and_gradient(lambda z: loss(z, labels), logits)
    from drs.triton_loss import LossInTriton

    monkeypatch.setattr(LossInTriton, "apply", None)
    leaf = logits.detach().requires_grad_()
    value = loss.backpropagate(leaf, labels)
    assert torch.equal(value, expected[0]) and leaf.grad is not None and torch.equal(leaf.grad, expected[1])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_kernel_in_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    plain = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]  # a conftest takes longer than the kernel
    command = [sys.executable, "-m", "pytest", "-q", *plain, __file__]
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("classes", [10, 9001])
def test_the_kernel_compiles_for_a_card(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card, for an H100: the interpreter takes Python that Triton's compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from drs.triton_loss import _plan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, rows, columns, warps = _plan(classes)
    constants = {"CLASSES": classes, "ROWS": rows, "BLOCK": columns, "GRADIENT": True}
    types = {
        "labels": "*i64",
        "batch": "i32",
        "ce_scale": "fp32",
        "weight": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["ptx"].count("st.global") >= 2, "the losses and the derivative"


@pytest.mark.skipif(INTERPRETED, reason="no matter of the kernel's")
@pytest.mark.parametrize(("batch", "classes"), CASES)
def test_it_is_the_loss_in_float64(device: str, batch: int, classes: int) -> None:
    assert_exact(DRSoftmaxLoss(weight=0.3), *random_case(batch, classes, device))


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize(("ce_weight", "weight"), [(1, 0), (0, 0.3), (1.7, 0.3), (0, 1)])
@pytest.mark.parametrize(("batch", "classes"), [(300, 10), (2, 4097)])
def test_weights_and_an_outer_factor(
    device: str, batch: int, classes: int, ce_weight: float, weight: float, factor: float
) -> None:
    loss = DRSoftmaxLoss(weight=weight, ce_weight=ce_weight)
    assert_exact(loss, *random_case(batch, classes, device), factor=factor)


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
@pytest.mark.parametrize(("batch", "classes"), [(300, 10), (2, 4097)])
@pytest.mark.parametrize(("scale", "shift"), [(1e4, 0.0), (3.0, 1e6), (3.0, -1e6), (1e-3, 30.0)])
def test_large_shifted_and_nearly_equal_logits(
    device: str, batch: int, classes: int, scale: float, shift: float, ce_weight: float
) -> None:
    """Also of the penalty alone, which the cross-entropy would hide where it is small."""
    logits, labels = random_case(batch, classes, device, scale)
    assert_exact(DRSoftmaxLoss(ce_weight=ce_weight), logits + shift, labels)


@pytest.mark.parametrize(("batch", "classes"), [(300, 10), (2, 4097)])
def test_a_label_far_above_the_others_takes_no_digits_from_them(device: str, batch: int, classes: int) -> None:
    logits, labels = random_case(batch, classes, device, scale=1e-3)
    logits.scatter_(1, labels[:, None], 1e4)
    assert_exact(DRSoftmaxLoss(ce_weight=0), logits, labels)


@pytest.mark.parametrize(("batch", "classes"), [(7, 3), (2, 4097)])
def test_it_can_be_differentiated_twice(device: str, batch: int, classes: int) -> None:
    logits, labels = random_case(batch, classes, device)
    loss = DRSoftmaxLoss(weight=0.3, ce_weight=1.7)

    def squared_gradient(function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    found = squared_gradient(lambda z: loss(z, labels), logits)
    exact = squared_gradient(lambda z: loss.eager(z, labels), logits.double())
    assert exact.abs().max() > 0 and (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("batch", "classes"), [(300, 10), (2, 4097)])
def test_the_same_bits_again_and_without_a_gradient(device: str, batch: int, classes: int) -> None:
    logits, labels = random_case(batch, classes, device)
    loss = DRSoftmaxLoss(weight=0.3)
    first, second = (value_and_gradient(lambda z: loss(z, labels), logits) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    before = logits.clone()
    assert torch.equal(loss(logits, labels), first[0]) and torch.equal(logits, before)


def test_a_graph_that_is_kept_gives_the_same_gradient_again(device: str) -> None:
    logits, labels = random_case(5, 7, device)
    value = DRSoftmaxLoss(weight=0.3)(logits.requires_grad_(), labels)
    (once,) = torch.autograd.grad(value, logits, retain_graph=True)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        assert torch.equal(logits.grad, times * once), "what is kept was changed along with the gradient"


@pytest.mark.parametrize("classes", [3, 10, 4097])
def test_an_impossible_label_gives_no_number(device: str, classes: int) -> None:
    """PyTorch's own loss stops the whole process on a card."""
    loss = DRSoftmaxLoss()
    loss.validate = False
    logits, labels = random_case(3, classes, device)
    for label in (-1, classes, classes + 2**32):
        labels[1] = label
        assert loss(logits, labels).isnan()
    logits[2, 1], labels[1] = float("nan"), 0
    assert loss(logits, labels).isnan()


@on_card
@pytest.mark.parametrize(("batch", "classes"), [(128, 10), (8192, 10), (1024, 1000), (256, 50257)])
def test_a_card_at_the_sizes_of_the_benchmark(batch: int, classes: int) -> None:
    from drs.benchmarks.losses import peak_bytes

    logits, labels = random_case(batch, classes, "cuda")
    loss = DRSoftmaxLoss()
    assert_exact(loss, logits, labels)
    logits.requires_grad_()

    def run(value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        value(logits, labels).backward()
        logits.grad = None

    loss.validate = False
    extra = peak_bytes(lambda: run(loss), "cuda") - peak_bytes(lambda: run(F.cross_entropy), "cuda")
    assert extra <= 0, "bytes beyond those of cross-entropy"


@on_card
def test_what_the_kernel_does_not_take_a_card_computes_in_calls() -> None:
    logits, labels = random_case(6, 8, "cuda")
    loss = DRSoftmaxLoss(weight=0.3)
    expected = value_and_gradient(lambda z: loss.eager(z, labels), logits)
    for view in (torch.Tensor.double, lambda z: z.t().contiguous().t()):
        assert not type(loss(view(logits.requires_grad_()), labels).grad_fn).__name__.startswith("LossInTriton")
        found = value_and_gradient(lambda z, view=view: loss(view(z), labels).float(), logits)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
