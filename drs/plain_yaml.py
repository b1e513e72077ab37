"""YAML files of plain values, read as OmegaConf reads them but some thirty times as fast. Imports no torch.

A study has thousands of ``config.yaml``; OmegaConf parses them in Python and builds a node for each value.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, which builds no objects, with OmegaConf's idea of a number; doubled keys are refused."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(None, None, "found duplicate key", node.start_mark)
        result: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return result


def is_plain(value: object) -> bool:
    """Return whether a value is one of JSON's kinds, and no text in it reads like an interpolation or a gap to fill."""
    if type(value) is dict:
        return all(type(key) is str and is_plain(part) for key, part in value.items())
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is str:
        return "$" not in value and "???" not in value
    return value is None or type(value) in (bool, int, float)


def read_plain_mapping(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a YAML file, or None where only OmegaConf can say what it means or what is wrong."""
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return content if type(content) is dict and is_plain(content) else None
