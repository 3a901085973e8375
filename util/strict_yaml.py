"""A YAML loader without the surprises of YAML 1.1."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """Loads plain values. Refuses a repeated key. Reads 010 as 10 instead of 8, and 1:30 as text instead of 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(f"lines {lines[key.value]} and {line} both set {key.value}; remove one")
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        text = node.value.replace("_", "")
        if ":" in text:
            return str(node.value)
        if node.tag.endswith("int") and not text.lstrip("+-").startswith(("0x", "0b")):
            return int(text)
        convert = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        return convert(node)


for _tag in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", StrictLoader.construct_number)


def load(text: str) -> Any:
    """Returns the value that a YAML document describes."""
    loader = StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
