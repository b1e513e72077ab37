"""Configs of many jobs: Hydra composes once for each choice of config groups, and plain values are set on copies.

Hydra takes a tenth of a second or more to compose a job, and a sweep over weights and seeds composes the same files
thousands of times. What is set here is what Hydra would set; whatever is not plainly a value is left to it.
"""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drs.config import TrainConfig, plain_config, plain_train_config, train_config
from drs.errors import UserError
from drs.plain_yaml import is_plain

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_INTERPOLATION = re.compile(r"\$\{(?!oc\.env:[^${}]*\})")
"""An interpolation other than of an environment variable: its value may depend on one that a job sets."""


@dataclass(frozen=True)
class _Base:
    """A composition: its plain values, None where one depends on others or is missing, and the keys without a value."""

    plain: dict[str, Any] | None
    gaps: frozenset[str] = frozenset()


class Composer:
    """Turns overrides into training configs.

    Args:
        compose: Composes overrides in full, as Hydra does.
        is_group: Whether a key names a config group.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig], is_group: Callable[[str], bool]) -> None:
        self.compose = compose
        self.is_group = functools.cache(is_group)
        self.bases: dict[tuple[str, ...], _Base] = {}

    def train_config(self, overrides: Sequence[str]) -> TrainConfig:
        """Return the config that ``train_config`` makes of a full composition.

        Raises:
            UserError: For a config that does not fit the schema.
            HydraException: For overrides that Hydra refuses.
        """
        plain = self._plain(overrides)
        return train_config(self.compose(list(overrides))) if plain is None else plain_train_config(plain)

    def _plain(self, overrides: Sequence[str]) -> dict[str, Any] | None:
        """Return the job's config as plain values, or None where it has to be composed in full."""
        parsed = [_parsed(override) for override in overrides]
        values: dict[str, object] = {}
        texts: dict[str, str] = {}
        base: list[str] = []
        for text, override in zip(overrides, parsed, strict=True):
            if override is None:
                return None
            key, value = override.key_or_group, override.value()
            chosen = self.is_group(key)
            if key.partition(".")[0].partition("/")[0] == "hydra" or (chosen and isinstance(value, str)):
                base.append(text)
            elif not chosen and _KEY.fullmatch(key) and not isinstance(value, list | dict) and is_plain(value):
                values[key], texts[key] = value, text
            else:
                return None
        found = self._base(base)
        if filled := sorted(found.gaps & values.keys()):
            # A key that has no value of its own, such as a procedure's epsilon, is composed with the groups.
            found = self._base([*base, *(texts[key] for key in filled)])
            values = {key: value for key, value in values.items() if key not in filled}
        if found.plain is None:
            return None
        plain = copy.copy(found.plain)
        return plain if all(_set(plain, key, value) for key, value in values.items()) else None

    def _base(self, overrides: list[str]) -> _Base:
        name = tuple(overrides)
        if name not in self.bases:
            self.bases[name] = self._composed(overrides)
        return self.bases[name]

    def _composed(self, overrides: list[str]) -> _Base:
        try:
            config = self.compose(overrides)
            ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            if gaps := OmegaConf.missing_keys(ours):
                return _Base(None, frozenset(gaps))
            dependent = _INTERPOLATION.search(repr(OmegaConf.to_container(ours, resolve=False)))
            return _Base(None if dependent else plain_config(ours))
        except (HydraException, OmegaConfBaseException, UserError):
            return _Base(None)  # the full composition says what is wrong


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override | None:
    """Parse an override; None for one that is refused, adds, removes, sweeps or names a package."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    simple = override.type == OverrideType.CHANGE and not override.is_sweep_override() and override.package is None
    return override if simple else None


def _set(plain: dict[str, Any], key: str, value: object) -> bool:
    """Set a value that is there already, copying the mappings on the way to it; return whether it could be done."""
    *parents, last = key.split(".")
    node = plain
    for name in parents:
        if not isinstance(node.get(name), dict):
            return False
        node[name] = dict(node[name])
        node = node[name]
    if last not in node or isinstance(node[last], dict | list):
        return False
    node[last] = value
    return True
