"""Passes of a model over small batches on a card, recorded once as CUDA graphs and replayed.

A pass over a small batch takes a card less time than the host needs to start its kernels one by one, and attacks on the
images that are left make thousands of such passes. A recorded pass is started at once. What is computed is the same,
but a batch is filled up to one of a few sizes, and kernels may round in another order for another size of batch.

Recording follows https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. A recording of a forward pass keeps
what the way back needs where it lies, so that the way back can be replayed more than once, as FAB asks for.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

REPLAYED_ON = ("cuda",)
"""The types of device whose passes can be recorded."""
SIZES = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""What batches are filled up to; a larger batch keeps a card busy for longer than its kernels take to start."""
PATIENCE = 12
"""Passes of a size before it is recorded, which takes some ten passes."""
KEPT = 6
"""Recordings of a model that are kept; each holds the memory of its passes."""
WARM_UP = 3
"""Passes before a recording: libraries choose kernels and allocate workspaces, which a recording does not allow."""
TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 0.1
"""How far a recording may be from a pass as it is: logits as a share of their largest, gradients as one of their
length. Rounding is far below, a recording that has missed something far above."""


class Recording(Protocol):
    """A pass over a batch of one size, with the way back or without."""

    def logits(self, images: Tensor) -> Tensor:
        """Return new logits ``[B, K]`` of images ``[B, C, H, W]``, B at most the size."""

    def gradient(self, upstream: Tensor) -> Tensor:
        """Return the new gradient ``[B, C, H, W]`` for the images of the last pass, from that of the logits."""


class CudaRecording:
    """A forward pass as one CUDA graph and the way back to the images as another.

    Args:
        model: In eval mode; its weights must stay where they are.
        images: ``[B, C, H, W]`` on a card, B at most ``size``.
        size: Images of a pass; those that are missing are black.
        backwards: Whether there is a way back.
    """

    def __init__(self, model: nn.Module, images: Tensor, size: int, backwards: bool) -> None:
        self.images = images.new_zeros((size, *images.shape[1:]))
        self.images[: len(images)] = images.detach()
        self.images.requires_grad_(backwards)
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream), torch.set_grad_enabled(backwards):
            for _ in range(WARM_UP):
                logits = model(self.images)
                if backwards:
                    torch.autograd.grad(logits, self.images, torch.ones_like(logits))
            del logits
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(backwards), torch.cuda.graph(self.forward):
            self.outputs = model(self.images)
        self.upstream = torch.zeros_like(self.outputs, requires_grad=False)
        if backwards:
            with torch.cuda.graph(self.backward, pool=self.forward.pool()):
                # The forward pass is kept: its memory must not be taken for what comes later on the way back.
                (self.found,) = torch.autograd.grad(self.outputs, self.images, self.upstream, retain_graph=True)

    def logits(self, images: Tensor) -> Tensor:
        """See ``Recording``."""
        self.count = len(images)
        with torch.no_grad():
            self.images[: self.count].copy_(images)
            self.forward.replay()
            return self.outputs[: self.count].clone()

    def gradient(self, upstream: Tensor) -> Tensor:
        """See ``Recording``."""
        with torch.no_grad():
            self.upstream.zero_()
            self.upstream[: self.count].copy_(upstream)
            self.backward.replay()
            return self.found[: self.count].clone()


class _Slot:
    """A recording and how many passes it has made."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.passes = recording, 0

    def logits(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.recording.logits(images)


class _Pass(Function):
    """A replayed pass. Where another has been made since, the way back begins with this one anew."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, slot: _Slot) -> Tensor:
        logits = slot.logits(images)
        ctx.slot, ctx.number = slot, slot.passes
        ctx.save_for_backward(images)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        if ctx.slot.passes != ctx.number:
            ctx.slot.logits(images)
            ctx.number = ctx.slot.passes
        return ctx.slot.recording.gradient(upstream), None


class Replayed(nn.Module):
    """A model whose passes over small batches are recorded when they recur, and replayed.

    Its parameters are the model's own. A model that cannot be recorded, or whose recording does not answer as it does,
    is called as it is.

    Args:
        model: In eval mode; float32 images ``[B, C, H, W]`` in, logits ``[B, K]`` out; the same function in every call.
        record: Makes a recording; called as ``CudaRecording``.
    """

    def __init__(self, model: nn.Module, record: Callable[[nn.Module, Tensor, int, bool], Recording]) -> None:
        super().__init__()
        self.model, self.record = model, record
        self.training = model.training
        self.off = False
        self._seen: Counter[Any] = Counter()
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, K]``."""
        slot = None if self.off else self._slot(images)
        if slot is None:
            logits: Tensor = self.model(images)
            return logits
        if images.requires_grad and torch.is_grad_enabled():
            logits = _Pass.apply(images, slot)
            return logits
        return slot.logits(images.detach())

    def _slot(self, images: Tensor) -> _Slot | None:
        """Return what replays this pass; None while it does not recur, or cannot be recorded."""
        size = next((size for size in SIZES if size >= len(images)), None)
        if size is None or not len(images) or images.dtype != torch.float32:
            return None
        backwards = images.requires_grad and torch.is_grad_enabled()
        # Which kernels are recorded depends on whether they may round to TF32.
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        key = (size, images.shape[1:], images.device, backwards, flags)
        if key in self._slots:
            self._slots.move_to_end(key)
            return self._slots[key]
        self._seen[key] += 1
        if self._seen[key] < PATIENCE:
            return None
        slot = self._recorded(images, size, backwards)
        self.off = slot is None
        if slot is not None:
            self._slots[key] = slot
            if len(self._slots) > KEPT:
                gone, _ = self._slots.popitem(last=False)
                self._seen[gone] = 0
        return slot

    def _recorded(self, images: Tensor, size: int, backwards: bool) -> _Slot | None:
        try:
            slot = _Slot(self.record(self.model, images, size, backwards))
            return slot if self._agrees(slot, images.detach(), backwards) else None
        except Exception:  # whatever a model does that cannot be recorded, want of memory among it
            return None

    def _agrees(self, slot: _Slot, images: Tensor, backwards: bool) -> bool:
        asked = images.clone().requires_grad_(backwards)
        expected = self.model(asked)
        found = slot.logits(images)
        close = (found - expected.detach()).abs().amax() <= TOLERANCE * expected.detach().abs().amax()
        if not backwards or not bool(close):
            return bool(close)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
        (gradient,) = torch.autograd.grad(expected, asked, upstream)
        for _ in range(2):  # the way back must hold for a second time
            apart = (slot.recording.gradient(upstream) - gradient).flatten(1).norm(dim=1)
            if not bool((apart <= GRADIENT_TOLERANCE * gradient.flatten(1).norm(dim=1)).all()):
                return False
        return True


def original(model: nn.Module) -> nn.Module:
    """Return the model that a ``Replayed`` is of; any other model is its own."""
    return model.model if isinstance(model, Replayed) else model


def replayed(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a model that replays its passes over small batches of ``images``; the model itself where there is none.

    Args:
        model: See ``Replayed``.
        images: ``[B, C, H, W]``, on the device of the passes.
    """
    return Replayed(model, CudaRecording) if images.device.type in REPLAYED_ON else model
