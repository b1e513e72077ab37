"""The rows of a GPU: the same work on the card where there is one, otherwise a row for each target that says so."""

from collections.abc import Iterator
from dataclasses import replace

from drs.benchmarks.harness import Row

TARGETS = {
    "gpu": (
        ("loss, forward and backward", "DR-softmax", "cross-entropy", "<= 2"),
        ("training step, resnet18 on cifar10", "DR-softmax", "cross-entropy", "<= 1.02"),
        ("PGD on an undefended model", "our PGD", "the fastest library", ">= 3"),
    ),
    "gpu_training": (
        ("CIFAR-10 to 94 % mean test accuracy", "ours", "airbench", "<= 1.2"),
        ("CIFAR-10, several models on one card, models a minute", "ours", "airbench", ">= 1.5"),
        ("64 MNIST lenets of 5 epochs", "the best packing", "60 s", "<= 1"),
    ),
    "gpu_studies": (("the mnist and the cifar10 study", "ours", "10 minutes", "<= 1"),),
}
"""What is asked of a GPU, by section: the case, ours, theirs, and the target of their ratio."""


def missing_rows(section: str, why: str) -> Iterator[Row]:
    """Yield a row without figures for each target of a section, with the reason."""
    for case, ours, theirs, target in TARGETS[section]:
        yield Row(section, case, ours, theirs, "", None, None, None, None, None, 0, target, "cuda", 0, note=why)


def moved(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows of another section as rows of this one."""
    return (replace(row, section="gpu") for row in rows)
