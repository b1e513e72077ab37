"""Where a study's numbers come from: commit, versions, hardware, time, data and attack settings."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drs.config import PROJECT_ROOT, EvaluateConfig, TrainConfig, project_path
from drs.data_sources import DATASETS, array_digest, read_cache
from drs.suite_config import decisive_epsilons, decisive_samples, suite_epsilons, suite_samples

PACKAGES = ("torch", "torchvision", "torchattacks", "foolbox", "numpy", "scipy", "pandas", "hydra-core")


def describe_study(
    config: EvaluateConfig,
    trained: list[TrainConfig],
    train_seconds: float,
    attack_seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Return the content of ``provenance.json``."""
    names = sorted({item.data.name for item in trained})
    cache = {item.data.name: project_path(item.data.cache) for item in trained}
    suite = config.suite
    norms = sorted({attack.norm for attack in suite.attacks.values()})
    return {
        "study": config.study,
        "suites": [suite.name],
        **describe_machine(device),
        "wall_seconds": {"train": round(train_seconds, 1), "attack": round(attack_seconds, 1)},
        "data": {name: _digests(name, cache[name]) for name in names},
        "attacks": {name: asdict(attack) for name, attack in suite.attacks.items()},
        "epsilons": {
            name: {norm: [epsilon.label for epsilon in suite_epsilons(suite, name, norm)] for norm in norms}
            for name in names
        },
        "decisive_epsilons": {
            name: {norm: [epsilon.label for epsilon in decisive_epsilons(suite, name, norm)] for norm in norms}
            for name in names
        },
        "n_attacked": {name: suite_samples(suite, name) for name in names},
        "n_decisive": {name: decisive_samples(suite, name) for name in names},
        "sanity": asdict(suite.sanity) if suite.sanity is not None else None,
        **({"fast_search": True} if suite.fast_search else {}),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return commit, time, versions and hardware."""
    return {
        **_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "hardware": hardware(device),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, memory and GPU of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str:
    """Return the version of an installed package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> dict[str, Any]:
    """Return the commit of this code, and whether there are changes to it."""
    bundle = PROJECT_ROOT / ".bundle.json"
    if bundle.exists():  # unpacked from a bundle, which holds a commit as it is; a repository around it is another's
        return {"commit": json.loads(bundle.read_text())["commit"], "dirty": False}
    # Results that were written anew since are no change of the code.
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results"))
    return {"commit": _git("rev-parse", "HEAD"), "dirty": dirty}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _digests(name: str, cache: Path) -> dict[str, Any]:
    spec, result = DATASETS[name], {}
    for split in ("train", "test"):
        known = spec.sha256.get(split)
        if known is None:
            arrays = read_cache(spec, split, cache)
            known = (array_digest(arrays[0]), array_digest(arrays[1])) if arrays else ("", "")
        result[split] = {"images": known[0], "labels": known[1]}
    return result
