"""One cell of an evaluation -> its per-sample arrays."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from drs.array_files import load_arrays_file, save_arrays
from drs.attack_config import AttackConfig, ConvergenceConfig, SanityConfig
from drs.attacks import build_attack, run_attack
from drs.attacks.contract import CleanLogits, predict
from drs.attacks.probes import run_convergence, run_probes
from drs.batches import in_batches
from drs.cells import LOGIT_BATCH, Cell, recorded_weights, standing_at
from drs.config import DataConfig, project_path
from drs.data import LabelledImages, load_test_split
from drs.errors import DamagedFileError, UserError


@functools.lru_cache(maxsize=2)
def _cached_test_split(
    name: str, n: int | None, root: str | None, cache: str, device: torch.device
) -> tuple[LabelledImages, np.ndarray]:
    return load_test_split(name, n=n, root=root, cache=cache, device=device)


def load_test(config: DataConfig, n: int | None, device: torch.device) -> tuple[LabelledImages, np.ndarray]:
    """Return the first ``n`` test samples of a data config in the fixed order, and their sample ids."""
    data, indices = _cached_test_split(config.name, None, config.root, str(project_path(config.cache)), device)
    if n is None:
        return data, indices
    if n > len(data):
        raise UserError(f"{n} test images of {config.name} are asked for, and there are {len(data)}")
    return data.first(n), indices[:n]


@torch.no_grad()
def clean_logits(
    model: nn.Module, data: LabelledImages, source: str, on_batch: Callable[[int], None] | None = None
) -> tuple[torch.Tensor, int]:
    """Return float32 logits ``[N, K]`` on the CPU and the batch size used; ``UserError`` where one is not finite.

    ``on_batch`` is called with the number of samples just finished.
    """

    def predict_batch(start: int, stop: int) -> torch.Tensor:
        logits = predict(model, data.pixels(torch.arange(start, stop)), source).cpu()
        if on_batch is not None:
            on_batch(stop - start)
        return logits

    parts, size = in_batches(predict_batch, len(data), LOGIT_BATCH, source)
    return torch.cat(parts), size


@dataclass(frozen=True)
class Before:
    """What the cells before one made of its N samples.

    Attributes:
        logits: ``[N, K]`` of the samples that have fallen; None without cells before.
        distance: ``[N]`` of the samples that have fallen, 0 elsewhere.
        standing: ``[N]`` bool, the samples that this cell is about.
    """

    logits: np.ndarray | None
    distance: np.ndarray
    standing: np.ndarray


@dataclass(frozen=True)
class Part:
    """What was computed of a cell for some of its samples.

    Attributes:
        arrays: With a row, or a column of ``standing``, for each sample.
        batch_size: Samples per batch: as asked, or less where a GPU's memory ran out.
        probes: The names of the rows of ``standing``.
    """

    arrays: dict[str, np.ndarray]
    batch_size: int
    probes: tuple[str, ...] = ()


class _CleanOfModel:
    """The clean images and logits of the model at work, for those of its cells that see the same samples.

    The model must stay as it is until ``forget``, which lets go of it and of what it has on a card.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._known: dict[tuple[str, bytes], CleanLogits] = {}

    def forget(self) -> None:
        """Let go of the model and its images."""
        self._model, self._known = None, {}

    def of(self, model: nn.Module, name: str, data: LabelledImages, chosen: np.ndarray) -> CleanLogits:
        """Return those of the samples at ``chosen`` of a data set's test split, of which ``data`` is the beginning."""
        if model is not self._model:
            self._model, self._known = model, {}
        key = name, chosen.tobytes()
        if key not in self._known:
            self._known[key] = CleanLogits(model, data.pixels(torch.from_numpy(chosen)))
        return self._known[key]


CLEAN = _CleanOfModel()


def fill_cell(
    cell: Cell,
    model: nn.Module,
    device: torch.device,
    before_writing: Callable[[], None] | None = None,
    on_images: Callable[[Cell, int, int], None] | None = None,
) -> float:
    """Compute a cell and write its arrays; return the seconds it took.

    Every cell has ``indices`` (sample ids), ``labels`` and ``about`` (JSON). An attack adds ``logits`` (of the
    adversarial images; of the clean one where the model is wrong already), ``distance`` (norm of the perturbation,
    pixel units) and ``attacked``; where it attacked only what cells before it left standing, the other samples keep
    the logits and the distance with which the first of those fooled the model. The checks add ``standing`` ``[P, N]``,
    in the order of ``about["probes"]``, and those of sanity ``gradient_norm``.

    ``before_writing`` is called when all is computed; what it raises keeps the arrays from being written. ``on_images``
    is called with the cell, how many of its images are done and how many are attacked, at first and after each batch.
    Cells of a model share what it says of the clean images, so it must not change between them (``CLEAN.forget``).

    Where a GPU's memory ran out the batch was halved, and ``about["batch_halved"]`` says from what to what: random
    starts are drawn batch by batch and torchattacks' CW stops on the total over a batch, so that the same cell comes
    out a little different in smaller batches. It stays the same cell; the report lists it.
    """
    began = time.perf_counter()
    before = read_before(cell, device)
    count = int(before.standing.sum())
    done = 0

    def count_images(n: int) -> None:
        nonlocal done
        done += n
        if on_images is not None:
            on_images(cell, done, count)

    count_images(0)
    parts = [compute_part(cell, model, device, before.standing, 0, count, count_images)] if count else []
    return write_cell(cell, device, before, parts, began, before_writing)


def read_before(cell: Cell, device: torch.device) -> Before:
    """Return what the cells before one made of its samples; a sample stands that none of them fooled."""
    n = len(load_test(cell.train.data, cell.n, device)[0])
    logits, distance, standing = None, np.zeros(n), np.ones(n, dtype=bool)
    for earlier in cell.after:
        arrays = load_arrays_file(earlier.path)
        count = min(n, len(arrays["labels"]))
        fallen = ~standing_at(arrays, cell.epsilon.value)[:count] & standing[:count]
        if logits is None:
            logits = np.zeros((n, arrays["logits"].shape[1]), dtype=np.float32)
        logits[:count][fallen] = arrays["logits"][:count][fallen]
        distance[:count][fallen] = arrays["distance"][:count][fallen]
        standing[:count] &= ~fallen
    return Before(logits, distance, standing)


def compute_part(
    cell: Cell,
    model: nn.Module,
    device: torch.device,
    standing: np.ndarray,
    start: int,
    stop: int,
    on_batch: Callable[[int], None] | None = None,
) -> Part:
    """Compute a cell for those of its standing samples that are number ``start`` to ``stop`` of them.

    Where ``start`` is the first sample of a batch, the part is what a computation of all would have there. ``on_batch``
    is called with the number of samples just finished.
    """
    data, _ = load_test(cell.train.data, cell.n, device)
    try:
        if isinstance(cell.config, AttackConfig):
            chosen = np.flatnonzero(standing)[start:stop]
            clean = None if cell.after else CLEAN.of(model, cell.train.data.name, data, chosen)
            places = torch.from_numpy(chosen).to(device)
            source = cell.source.load_model(device) if cell.source else None
            outcome = run_attack(
                build_attack(cell.config, adaptive_objectives=cell.objectives, source=source),
                model, data.pixels(places) if clean is None else clean.images, data.labels[places],
                epsilon=cell.epsilon.value, batch_size=cell.batch_size, seed=cell.config.seed + start,
                on_batch=on_batch, clean=clean, fast_search=cell.fast_search, replay=cell.replay,
            )  # fmt: skip
            arrays = {"logits": outcome.logits.numpy(), "distance": outcome.distance.numpy()}
            return Part(arrays, outcome.batch_size)
        if isinstance(cell.config, SanityConfig):
            probes = run_probes(
                model, data.pixels(), data.labels, cell.epsilon.value, cell.config, fast_search=cell.fast_search
            )
            arrays = {"standing": np.stack(list(probes.standing.values())), "gradient_norm": probes.gradient_norm}
            return Part(arrays, probes.batch_size, tuple(probes.standing))
        if isinstance(cell.config, ConvergenceConfig):
            own = replace(cell.config, seed=cell.config.seed + start)
            part = data.pixels(torch.arange(start, stop)), data.labels[start:stop]
            found, size = run_convergence(model, *part, cell.epsilon.value, own, fast_search=cell.fast_search)
            return Part({"standing": np.stack(list(found.values()))}, size, tuple(found))
        logits, size = clean_logits(model, data, "clean images", on_batch)
        return Part({"logits": logits.numpy(), "distance": np.zeros(len(data))}, size)
    except DamagedFileError:
        raise
    except UserError as error:
        raise UserError(f"run {cell.run.run_id}, {cell.title}: {error}") from None


def write_cell(
    cell: Cell,
    device: torch.device,
    before: Before,
    parts: Sequence[Part],
    began: float,
    before_writing: Callable[[], None] | None = None,
) -> float:
    """Write the arrays of a cell from its parts, in order; return the seconds since ``began``.

    Args:
        cell: The cell.
        device: Where it was computed.
        before: What ``read_before`` returned.
        parts: Of all standing samples; none where no sample stood.
        began: ``time.perf_counter()`` at the start.
        before_writing: See ``fill_cell``.
    """
    data, indices = load_test(cell.train.data, cell.n, device)
    size = min((part.batch_size for part in parts), default=cell.batch_size)
    about: dict[str, Any] = {
        "attack": cell.attack,
        "config": asdict(cell.config) if cell.config is not None else None,
        "objectives": list(cell.objectives),
        "source": cell.source.run_id if cell.source else None,
        "epsilon_label": cell.epsilon.label,
        "device": device.type,
        "torch": torch.__version__,
        "weights": recorded_weights(cell.run),
    }
    if cell.is_attack:
        arrays = _with_fallen(before, parts)
    else:
        arrays = parts[0].arrays
        if isinstance(cell.config, ConvergenceConfig):
            arrays = {"standing": np.concatenate([part.arrays["standing"] for part in parts], axis=1)}
        if parts[0].probes:
            about["probes"] = list(parts[0].probes)
    if size < cell.batch_size:
        about["batch_halved"] = {"from": cell.batch_size, "to": size}
    about["seconds"] = seconds = time.perf_counter() - began
    if before_writing is not None:
        before_writing()
    save_arrays(
        cell.path,
        indices=indices.astype(np.int32),
        labels=data.labels.cpu().numpy().astype(np.int16),
        **arrays,
        about=np.array(json.dumps(about)),
    )
    return seconds


def _with_fallen(before: Before, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """Return the arrays of an attack: what the cells before it made of the fallen, and what it made of the others."""
    logits, distance, standing = before.logits, before.distance, before.standing
    if parts:
        found = np.concatenate([part.arrays["logits"] for part in parts])
        if logits is None:
            logits = found
        else:
            logits[standing] = found
        distance[standing] = np.concatenate([part.arrays["distance"] for part in parts])
    assert logits is not None  # without cells before this one every sample stands
    return {"logits": logits, "distance": distance, "attacked": standing}
