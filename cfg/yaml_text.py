"""YAML that anybody may have written: plain values in mappings and lists, and no more of them than stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 2**17  # of a file; the library reads about 100,000 a second


def read_yaml(path: Path, depth: int) -> Any:
    """The content of a file, whose mappings and lists stand at most `depth` deep in one another.

    Neither anchors nor tags: ten lines of the first can mean more than any memory holds. Raises ValueError, which says
    what is wrong, or OSError if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")  # a pipe, say, on which one would wait
    with open(path, encoding="utf-8") as f:
        text = f.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"is larger than {MOST_CHARACTERS:,} characters")
    try:
        _check_plain(text, depth)
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"is not readable as YAML: {e}") from e


def _check_plain(text: str, depth: int) -> None:
    """Looks at the events of the parser, which itself neither copies nor recurses."""
    inside = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.NodeEvent) and (event.anchor is not None or getattr(event, "tag", None) is not None):
            raise ValueError(f"line {line}: anchors, aliases and tags are not read")
        if isinstance(event, yaml.CollectionStartEvent):
            inside += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            inside -= 1
        if inside > depth:
            raise ValueError(f"line {line}: a list or mapping too many, one inside another")
