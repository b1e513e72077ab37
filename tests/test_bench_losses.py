"""The benchmark's rows of the loss at tiny shapes, and what surrounds the parts that need a GPU. No time is tested."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_train
from torch import nn

from drs import fused_loss
from drs.benchmarks import losses
from drs.benchmarks.harness import Machine, Row, count_flops
from drs.benchmarks.losses import COMPILED, PLAIN, loss_rows, peak_bytes, step_rows
from drs.checkpoints import build_model_of
from drs.losses import DRSoftmaxLoss

SMALL = (16, 50, 3)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the shapes tiny, compile nothing, and check no labels, which training does not either."""
    monkeypatch.setattr("drs.loss_base.check_targets", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(losses, "SHAPES", (SMALL,))
    monkeypatch.setattr(losses, "COMPILED_ON_CPU", ())


@pytest.fixture
def compiled(shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tiny shape compiled, as if there were a C++ compiler."""
    monkeypatch.setattr(losses, "COMPILED_ON_CPU", (SMALL[:2],))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


@pytest.mark.usefixtures("shapes")
def test_loss_rows_count_no_tensor_beyond_one() -> None:
    timed, memory, *tried = loss_rows()
    assert timed.ratio is not None and timed.repeats == 3 and not timed.tried
    assert {(row.device, row.threads) for row in (timed, memory, *tried)} == {("cpu", 7)}
    assert memory.ratio is not None and -1 < memory.ratio <= 1.2  # beside [B, K] there are a few [B] tensors
    assert [row.ours for row in tried] == ["DR-softmax in few passes", PLAIN]
    assert not timed.note and "Triton" not in tried[0].note + timed.reason
    assert all(row.tried and row.ratio and row.theirs_median == timed.theirs_median for row in tried)


def _numbered(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[Callable[[], object]]:
    """Give what is timed seconds by its place, and return the list that it is put into."""
    timed: list[Callable[[], object]] = []

    def time_in_turn(functions: list[Callable[[], object]], repeats: int, **_: object) -> object:
        timed.extend(functions)
        return torch.tensor(list(seconds.values())).double().expand(repeats, -1).numpy()

    monkeypatch.setattr(losses, "time_in_turn", time_in_turn)
    return timed


@pytest.mark.usefixtures("shapes")
def test_each_row_has_the_time_of_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"one": 1e-6, "copy": 3e-6, "DR": 8e-6, "CE": 4e-6, "other form": 12e-6, "plain": 20e-6}
    functions = _numbered(monkeypatch, seconds)
    timed, _, other, plain = loss_rows()
    assert timed.least == pytest.approx(3e-3) and "copy of the logits" in timed.floor
    assert (timed.ratio, other.ratio, plain.ratio) == pytest.approx((2, 3, 5))
    assert (timed.ours_median, plain.ours_median, plain.theirs_median) == pytest.approx((8e-3, 20e-3, 4e-3))
    assert other.least == timed.least and not other.target and not other.reason

    # And the functions are in that order.
    called: list[str] = []
    for form in (fused_loss._LossInFewCalls, fused_loss._LossInFewPasses):
        monkeypatch.setattr(form, "apply", lambda *given, form=form: called.append(form.__name__) or given[0].sum())
    results = []
    for function in functions:
        called.append("-")
        results.append(function())
    assert called == ["-", "-", "-", "_LossInFewCalls", "-", "-", "_LossInFewPasses", "-"]
    assert [result.numel() for result in results[:2]] == [1, SMALL[0] * SMALL[1]] and set(results[2:]) == {None}


def test_copies_are_of_one_number_and_of_the_logits() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    for part in (logits[:1, :1], logits):
        copy = losses._copy_of(part)
        assert torch.equal(copy(), part) and copy().data_ptr() == copy().data_ptr() != part.data_ptr()  # type: ignore[attr-defined]


def test_nothing_stays_behind_a_run() -> None:
    """Neither in the time nor in the memory of the next."""
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    gradients: list[torch.Tensor] = []
    logits.register_post_accumulate_grad_hook(lambda leaf: gradients.append(leaf.grad))
    losses._forward_and_backward(F.cross_entropy, logits, labels)
    assert len(gradients) == 1 and logits.grad is None


class _Kernel(fused_loss._LossInFewCalls):
    """Stands in for the form in Triton."""


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have float32 logits take the stand-in, as on a card."""
    monkeypatch.setattr(fused_loss, "_is_on_current_card", lambda logits, labels: True)
    monkeypatch.setattr(fused_loss, "_triton_form", lambda classes: _Kernel)


def _names_of_other_forms(batch: int) -> list[str]:
    """Check each of the other forms of the loss at a size, and return their names."""
    loss = DRSoftmaxLoss()
    logits, labels = torch.randn(batch, 4, requires_grad=True), torch.zeros(batch, dtype=torch.int64)
    others = losses._other_forms(loss, logits, labels)
    for name, value in others.items():
        before = fused_loss.FEW_ELEMENTS, fused_loss.TRITON
        result = value(logits, labels)
        assert type(result.grad_fn).__name__ == f"{losses.IN_CALLS[name].__name__}Backward"
        assert before == (fused_loss.FEW_ELEMENTS, fused_loss.TRITON)
        torch.testing.assert_close(result, loss(logits, labels))
    return list(others)


def test_the_other_form_is_the_one_not_taken() -> None:
    assert _names_of_other_forms(4) == ["DR-softmax in few passes"]
    assert _names_of_other_forms(fused_loss.FEW_ELEMENTS // 4 + 1) == ["DR-softmax in few calls"]


@pytest.mark.usefixtures("triton")
def test_beside_the_kernel_both_forms_in_calls_are_others() -> None:
    for batch in (4, fused_loss.FEW_ELEMENTS // 4 + 1):
        assert _names_of_other_forms(batch) == ["DR-softmax in few calls", "DR-softmax in few passes"]


def test_the_reason_is_what_the_copies_say() -> None:
    few, many = losses._why_missed(2e-6, 3e-6), losses._why_missed(2e-6, 5e-3)
    assert "5e+03 µs, to copy a single number 2 µs" in many
    assert "calls of PyTorch" in few and "passes over" not in few
    assert "passes over [B, K]" in many and "calls of PyTorch" not in many
    few, many = losses._why_missed(2e-6, 3e-6, triton=True), losses._why_missed(2e-6, 5e-3, triton=True)
    assert "it is calls" in few and "one kernel, which Triton launches" in few and "either form" not in few
    assert "it is memory" in many and "The kernel reads" in many and "an operation of PyTorch on its own" not in many


@pytest.mark.usefixtures("compiled")
def test_the_plain_loss_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what captures it, without the C++ compiler, which takes many seconds."""
    real, calls = torch.compile, []

    def compiled(function: Callable[..., torch.Tensor], **options: bool) -> Callable[..., torch.Tensor]:
        value = real(function, backend="aot_eager", **options)
        return lambda *given: calls.append(options) or value(*given)

    monkeypatch.setattr(torch, "compile", compiled)
    *_, plain, row = loss_rows()
    assert calls == [{"dynamic": False, "fullgraph": True}] * (1 + 5 + 3)  # once to compile, to warm up, and timed
    assert (plain.ours, row.ours, row.tried, row.repeats) == (PLAIN, COMPILED, True, 3)
    assert row.ratio is not None and "not counted" in row.note


@dataclass
class _Fails:
    """Stands in for ``torch.compile``; what it returns raises when it is called, as compilers do."""

    error: Exception
    shapes: list[torch.Size] = field(default_factory=list)

    def __call__(self, function: object, **options: object) -> Callable[..., torch.Tensor]:
        def value(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.shapes.append(logits.shape)
            raise self.error

        return value


def _assert_not_measured(row: Row, note: str) -> None:
    assert (row.ours, row.verdict, row.tried, row.ours_median, row.repeats) == (COMPILED, "not measured", True, None, 0)
    assert row.note == note and not row.target


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ImportError("no Triton\nat all"), "not compiled: ImportError: no Triton"),
        (AssertionError(), "not compiled: AssertionError: it does not say why"),
    ],
)
def test_a_compiler_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, error: Exception, note: str) -> None:
    fails = _Fails(error)
    monkeypatch.setattr(torch, "compile", fails)
    *others, row = loss_rows()
    assert len(others) == 4 and fails.shapes == [SMALL[:2]]
    _assert_not_measured(row, note)


@pytest.mark.usefixtures("compiled")
def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", {}.get)
    monkeypatch.setattr(torch, "compile", None)
    for cxx, named in (("", "g++"), ("clang++", "clang++")):
        monkeypatch.setenv("CXX", cxx)
        *_, row = loss_rows()
        _assert_not_measured(row, f"not compiled: there is no C++ compiler, {named}")


class _Card:
    """An allocator as that of ``torch.cuda``: bytes given out, and the most since the peak was last reset."""

    def __init__(self, held: int) -> None:
        self.held = self.peak = held
        self.calls = 0

    def hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def run(self) -> None:
        """Hold 70 bytes at most, and 1000 more that are kept from the first call on."""
        self.hold(0 if self.calls else 1000)
        self.calls += 1
        for size in (50, 20, -30, -40):
            self.hold(size)

    def reset(self) -> None:
        self.peak = self.held


def test_peak_bytes_of_a_card_are_beyond_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(400)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: card.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", card.reset)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    card.hold(5000)
    card.hold(-5000)
    assert peak_bytes(card.run, "cuda") == 70
    assert card.calls == 2


def test_peak_bytes_of_a_cpu_are_of_tensors() -> None:
    assert peak_bytes(lambda: torch.empty(100) + 1, "cpu") == 800


@pytest.fixture
def card(shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the rows of a card made on a CPU: ``Tensor.to`` and the card's own functions are replaced."""
    peaks = iter([4 * 800 * 5, 4 * 800 * 3])  # ours and theirs
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("shutil.which", {}.get)


@pytest.mark.usefixtures("card")
def test_on_a_card_everything_is_asked_of_the_card() -> None:
    timed, memory, *tried = loss_rows("cuda")
    assert memory.ratio == 2 and "the card's allocator" in memory.note
    assert [row.ours for row in tried] == ["DR-softmax in few passes", PLAIN, COMPILED]
    assert tried[-1].ratio is not None, "on a card nobody asks for a C++ compiler"
    assert {(row.device, row.threads) for row in (timed, memory, *tried)} == {("cuda", 1)}
    assert "Triton is missing" in timed.note and "without Triton" not in tried[0].note


@pytest.mark.usefixtures("card", "triton")
def test_on_a_card_the_kernel_is_measured_and_the_forms_in_calls_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = _numbered(
        monkeypatch, dict.fromkeys(["one", "copy", "DR", "CE", "calls", "passes", "plain", "c"], 1e-6)
    )
    called: list[str] = []
    for form in (_Kernel, *losses.IN_CALLS.values()):
        monkeypatch.setattr(form, "apply", lambda *given, form=form: called.append(form.__name__) or given[0].sum())
    timed, _, *tried = loss_rows("cuda")
    assert [row.ours for row in tried] == [*losses.IN_CALLS, PLAIN, COMPILED]
    assert timed.note.startswith("one kernel in Triton") and "which Triton launches" in timed.reason
    assert all("takes, without Triton, its form of few calls" in row.note for row in tried[:2])
    called.clear()
    for function in functions[2:6]:
        function()
    assert called == ["_Kernel", "_LossInFewCalls", "_LossInFewPasses"]


def test_the_step_is_worded_and_bounded_for_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "STEP_PAIRS", 3)
    config = compose_train("data=digits", "model=mlp", "loss=dr_softmax", "optim=adam", "batch_size=32", "device=cpu")
    (row,) = step_rows(config, Machine(gigaflops=1e-3, gigabytes=1))
    assert (row.repeats, row.target, row.verdict in ("met", "missed")) == (3, "<= 1.02", True)
    assert row.reason.startswith(f"A step of mlp with cross-entropy takes {row.theirs_median:.3g} ms")
    assert "on 32 x 10 logits" in row.reason
    # Each weight takes part in two operations for an image on the way forward, and on the way back in two for its own
    # gradient and, beyond the first layer, in two for that of its input. 1e6 operations take a second.
    weights = [layer.weight.numel() for layer in build_model_of(config).modules() if isinstance(layer, nn.Linear)]
    assert row.least == pytest.approx(32 * (6 * sum(weights) - 2 * weights[0]) * 1e-3)
    (row,) = step_rows(config)
    assert row.least is None and not row.floor


def test_on_a_card_the_step_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its convolutions may be faster than the rate in float32."""
    monkeypatch.setattr(losses, "choose_device", torch.device)
    figures = {"loss_ms": 4.5, "baseline_ms": 4.0, "ratio": 1.125, "ci_low": 1.1, "ci_high": 1.2}
    monkeypatch.setattr(losses, "time_steps", lambda config, device, n_pairs: figures)
    config = compose_train("data=digits", "model=mlp", "loss=dr_softmax", "device=cuda")
    (row,) = step_rows(config, Machine(1, 1))
    assert (row.ours_median, row.theirs_median, row.ratio, row.low, row.high) == (4.5, 4.0, 1.125, 1.1, 1.2)
    assert (row.device, row.threads, row.least, row.floor, row.verdict) == ("cuda", 1, None, "", "missed")
    assert "leaves the loss 0.08 ms beyond it" in row.reason and "it takes 0.5 ms" in row.reason


def test_operations_of_a_step_are_those_of_a_real_one() -> None:
    config = compose_train("data=mnist", "model=lenet", "loss=dr_softmax", "optim=adam", "batch_size=4")
    model, images = build_model_of(config), torch.rand(4, 1, 28, 28)
    real = count_flops(lambda: F.cross_entropy(model(images), torch.zeros(4, dtype=torch.int64)).backward())
    assert losses._flops_of_step(config) == real > 1e6
