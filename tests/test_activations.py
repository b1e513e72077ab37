"""Bias, shortcut and ReLU in one pass: values and gradients, what is fused, and the kernel in Triton's interpreter."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from drs.attacks import activations
from drs.attacks import stand_in as stand_in_module
from drs.attacks.activations import BiasedReLU, fuse_activations
from drs.attacks.half_precision import HalfPrecision, in_half_precision
from drs.models import build_model

ROOT = Path(__file__).parent.parent
IN_INTERPRETER = """
import torch
from drs.attacks.triton_relu import biased_relu

torch.manual_seed(0)
for shape, dtype, shortcut in (
    ((3, 16, 5, 7), torch.float32, False), ((2, 24, 9, 11), torch.float16, True), ((1, 64, 8, 8), torch.float16, False),
    ((0, 16, 4, 4), torch.float16, True),
):
    values, other = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    if len(values):
        values[0, 0, 0, 0] = float("nan")
    bias = torch.randn(shape[1])
    found = biased_relu(values, bias, other if shortcut else None)
    total = values.float() + bias.view(1, -1, 1, 1) + (other.float() if shortcut else 0)
    torch.testing.assert_close(found, total.relu().half(), equal_nan=True, rtol=1e-3, atol=1e-3)
    assert found.is_contiguous(memory_format=torch.channels_last)
print("the kernel holds")
"""


def plain(values: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    total = values + bias.view(1, -1, 1, 1)
    return (total if shortcut is None else total + shortcut).relu()


def take_bias(module: nn.Module) -> Tensor | None:
    if not isinstance(module, nn.Conv2d) or module.bias is None:
        return None
    bias, module.bias = module.bias, None
    return bias


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_and_gradients_are_those_of_the_three_operations(shortcut: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, upstream = (torch.randn(4, 5, 6, 7, generator=generator).to(dtype) for _ in range(3))
    bias = torch.randn(5, generator=generator)
    leaves = [first.clone().requires_grad_(), *([second.clone().requires_grad_()] if shortcut else [])]
    found = BiasedReLU(bias)(*leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(exact[0], bias.double(), exact[1] if shortcut else None)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    for one, other in zip(
        torch.autograd.grad(found, leaves, upstream.half()), torch.autograd.grad(expected, exact, upstream.double()),
        strict=True,
    ):  # fmt: skip
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-6)


def test_what_is_not_a_number_stays_that() -> None:
    values = torch.tensor([float("nan"), -1.0, 1.0]).view(1, 3, 1, 1)
    assert torch.isnan(BiasedReLU(torch.zeros(3))(values)).flatten().tolist() == [True, False, False]


class Branches(nn.Module):
    """ReLUs of all kinds.

    One to fuse each of a convolution, of a sum with a shortcut on its left, and of a sum of two convolutions. And to be
    left: of a layer that is called twice, of one whose value is used twice, of a sum of neither, of a sum that is used
    twice, of a value that is added to itself, and of a layer whose bias is read by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, values: Tensor) -> Tensor:
        one, two, three, four, twice, wanted, summed, doubled, read = self.convolutions
        values = self.relu(one(values))
        shortcut = values
        values = torch.relu(shortcut + two(values))
        values = nn.functional.relu(three(values) + four(values))
        values = self.relu(twice(twice(values)))
        both = wanted(values)
        values = torch.relu(both) + both
        values = self.relu(values + shortcut)
        total = summed(values) + shortcut
        values = torch.relu(total) + total
        double = doubled(values)
        values = torch.relu(double + double)
        return self.relu(read(values)) + read.bias.view(-1, 1, 1)


def test_relus_take_the_biases_that_nobody_else_wants() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    images = torch.rand(3, 4, 6, 6)
    traced = fx.symbolic_trace(copy.deepcopy(model).half())
    with torch.no_grad():
        assert fuse_activations(traced, take_bias) == 3
        torch.testing.assert_close(traced(images.half()).float(), model(images), rtol=1e-2, atol=5e-3)
    fused = [module for module in traced.modules() if isinstance(module, BiasedReLU)]
    assert len(fused) == 3
    torch.testing.assert_close(
        fused[2].bias, model.convolutions[2].bias + model.convolutions[3].bias, rtol=0, atol=1e-3
    )
    left = [module.bias is not None for module in traced.get_submodule("convolutions").children()]
    assert left == [False] * 4 + [True] * 5


def test_traced_copy_in_float16_is_fused_and_the_same() -> None:
    torch.manual_seed(0)
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    model = build_model("resnet18", num_classes=10, channels=3, size=32, **statistics).eval()  # type: ignore[arg-type]
    images = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
                module.bias.normal_(0, 0.3)
        folded = stand_in_module._folded(model)
        assert folded is not None
        plainly, fused = HalfPrecision(folded, images), HalfPrecision(folded, images, fused=True)
        apart = (plainly(images) - fused(images)).abs().max() / model(images).abs().max()
    assert sum(isinstance(module, BiasedReLU) for module in fused.modules()) == 17
    assert not any(isinstance(module, nn.Conv2d) and module.bias is not None for module in fused.modules())
    assert float(apart) < 5e-3
    assert in_half_precision(folded, images, fused=True) is not None, "its gradients are like the model's"
    assert all(module.bias is not None for module in folded.modules() if isinstance(module, nn.Conv2d)), "it is a copy"


def test_copy_that_cannot_be_fused_is_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    torch.manual_seed(0)
    model = build_model("smallcnn", num_classes=3, channels=3, size=8, mean=[0.5] * 3, std=[0.25] * 3).eval()
    images = torch.rand(4, 3, 8, 8)
    monkeypatch.setattr(stand_in_module, "HALF_PRECISION_ON", ("cpu",))
    fused, unfused, folded_only = stand_in_module._copies(model, images)
    monkeypatch.setattr(activations, "_biased_relu", fail)
    first, _ = stand_in_module._copies(model, images)
    assert isinstance(first, HalfPrecision) and not isinstance(folded_only, HalfPrecision)
    for found, expected in ((fused, True), (unfused, False), (first, False)):
        assert isinstance(found, HalfPrecision)
        assert any(isinstance(module, BiasedReLU) for module in found.modules()) == expected


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    found = subprocess.run(
        [sys.executable, "-c", IN_INTERPRETER], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert found.stdout.strip() == "the kernel holds", found.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("shortcut", [True, False])
def test_kernel_on_a_card_is_used_for_channels_last_only(shortcut: bool) -> None:
    kernel = activations._kernel()
    assert kernel is not None
    for form in (torch.channels_last, torch.contiguous_format):
        values, other = (torch.randn(3, 16, 5, 5, device="cuda").half().contiguous(memory_format=form) for _ in "ab")
        bias = torch.randn(16, device="cuda")
        found = BiasedReLU(bias)(values, *([other] if shortcut else []))
        expected = plain(values.float(), bias, other.float() if shortcut else None)
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
        assert found.is_contiguous(memory_format=form)
