"""One cell of an evaluation -> its per-sample arrays."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from drs.array_files import load_arrays_file, save_arrays
from drs.attack_config import AttackConfig, SanityConfig
from drs.attacks import build_attack, run_attack
from drs.attacks.contract import predict
from drs.attacks.probes import run_probes
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
        raise UserError(f"suite.n_samples.{config.name}={n}: the test set has {len(data)} samples")
    return LabelledImages(data.images[:n], data.labels[:n]), indices[:n]


@torch.no_grad()
def clean_logits(model: nn.Module, data: LabelledImages, source: str) -> tuple[torch.Tensor, int]:
    """Return float32 logits ``[N, K]`` on the CPU and the batch size used; ``UserError`` where one is not finite."""
    parts, size = in_batches(
        lambda start, stop: predict(model, data.pixels(torch.arange(start, stop)), source).cpu(),
        len(data), LOGIT_BATCH, source,
    )  # fmt: skip
    return torch.cat(parts), size


def fill_cell(
    cell: Cell, model: nn.Module, device: torch.device, before_writing: Callable[[], None] | None = None
) -> float:
    """Compute a cell and write its arrays; return the seconds it took.

    Every cell has ``indices`` (sample ids), ``labels`` and ``about`` (JSON). An attack adds ``logits`` (of the
    adversarial images; of the clean one where the model is wrong already), ``distance`` (norm of the perturbation,
    pixel units) and ``attacked``; where it attacked only what cells before it left standing, the other samples keep
    the logits and the distance with which the first of those fooled the model. The sanity checks add ``standing``
    ``[P, N]``, in the order of ``about["probes"]``, and ``gradient_norm``.

    ``before_writing`` is called when all is computed; what it raises keeps the arrays from being written.

    Where a GPU's memory ran out the batch was halved, and ``about["batch_halved"]`` says from what to what: random
    starts are drawn batch by batch and torchattacks' CW stops on the total over a batch, so that the same cell comes
    out a little different in smaller batches. It stays the same cell; the report lists it.
    """
    data, indices = load_test(cell.train.data, cell.n, device)
    source = f"run {cell.run.run_id}"
    began = time.perf_counter()
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
    try:
        if isinstance(cell.config, AttackConfig):
            arrays, size = _attack(cell, cell.config, model, data, device)
        elif isinstance(cell.config, SanityConfig):
            probes = run_probes(model, data.pixels(), data.labels, cell.epsilon.value, cell.config)
            about["probes"], size = list(probes.standing), probes.batch_size
            arrays = {"standing": np.stack(list(probes.standing.values())), "gradient_norm": probes.gradient_norm}
        else:
            logits, size = clean_logits(model, data, "clean images")
            arrays = {"logits": logits.numpy(), "distance": np.zeros(len(data))}
    except DamagedFileError:
        raise
    except UserError as error:
        raise UserError(f"{source}, {cell.title}: {error}") from None
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


def _attack(
    cell: Cell, config: AttackConfig, model: nn.Module, data: LabelledImages, device: torch.device
) -> tuple[dict[str, np.ndarray], int]:
    source = cell.source.load_model(device) if cell.source else None
    attack = build_attack(config, adaptive_objectives=cell.objectives, source=source)
    images, labels = data.pixels(), data.labels
    logits, distance, standing = _before(cell, len(images))
    size = cell.batch_size
    if standing.any():
        chosen = torch.from_numpy(np.flatnonzero(standing)).to(device)
        outcome = run_attack(
            attack, model, images[chosen], labels[chosen], epsilon=cell.epsilon.value, batch_size=size,
            seed=config.seed,
        )  # fmt: skip
        size = outcome.batch_size
        if logits is None:
            logits = outcome.logits.numpy()
        logits[standing], distance[standing] = outcome.logits.numpy(), outcome.distance.numpy()
    assert logits is not None  # without cells before this one every sample stands
    return {"logits": logits, "distance": distance, "attacked": standing}, size


def _before(cell: Cell, n: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Return what the cells before one made of its samples: logits ``[N, K]``, distances and which still stand."""
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
    return logits, distance, standing
