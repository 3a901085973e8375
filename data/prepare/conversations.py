"""Conversations from the rows of .jsonl, .json and .parquet files, in the formats of common instruction data.

| format | fields |
|---|---|
| messages | messages: a list of {role, content} |
| conversations | conversations: a list of {from, value}, and perhaps system (ShareGPT) |
| instruction | instruction, input, output, and perhaps system (Alpaca) |
| prompt | prompt, completion, and perhaps system |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data.prepare.inputs import Damaged, is_dataset, is_remote, kind_of
from data.prepare.parquet import object_rows
from data.prepare.text_files import is_list, line_rows, list_rows
from util.errors import UserError, quote
from util.files import refuse_lfs_pointer

# The fields by which a row is recognised, in this order, and the fields that may be missing.
FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
OPTIONAL = ("input", "system")
COLUMNS = (*(field for fields in FORMATS.values() for field in fields), *OPTIONAL)
ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    **{"human": "user", "gpt": "assistant"},
}


def read_conversations(
    path: str, kind: str, convert: Callable[[Any], Any], skip_bad: bool, skipped: Counter[str]
) -> Iterator[Any]:
    """Yields `convert(row)` of each row of a file. `kind` is the value of --format.

    A row for which `convert` raises ValueError is an error that names its place, or is counted in `skipped` with
    `skip_bad`.
    """
    if is_remote(path) or is_dataset(path):
        raise UserError(f"{quote(path)}: conversations are read from files on this machine; download it first")
    refuse_lfs_pointer(path)
    rows: Iterable[tuple[int, Any]]
    try:
        if (found := kind_of(path, kind)) == "parquet":
            rows = object_rows(path, COLUMNS, convert, skip_bad, skipped)
        elif found != "jsonl":
            raise UserError(f"{path}: conversations are read from .jsonl, .json and .parquet files; see --format")
        elif is_list(path):
            rows = list_rows(path, convert, skip_bad, skipped)
        else:
            rows = line_rows(path, 0, None, convert, skip_bad, skipped)
        for _, value in rows:
            yield value
    except Damaged:
        if not skip_bad:
            raise
        skipped["bad"] += 1


def messages_of(row: Any, kind: str = "") -> list[dict[str, str]]:
    """Returns the messages of a row, {"role", "content"} each. [] if they, or all replies, are empty.

    `kind` is one of FORMATS, or "" to recognise it by the row's fields. Raises ValueError with a message that follows
    "line N".
    """
    if not isinstance(row, dict):
        raise ValueError(" is not a JSON object")
    known = {name: fields for name, fields in FORMATS.items() if not kind or name == kind}
    name = next((name for name, fields in known.items() if all(row.get(f) is not None for f in fields)), None)
    if name is None:
        if any(all(field in row for field in fields) for fields in known.values()):
            return []  # the fields are null
        wanted = ", or ".join(" and ".join(fields) for fields in known.values())
        there = ", ".join(map(quote, list(row)[:6])) or "none"
        raise ValueError(f" needs the fields {wanted}; it has {there}")
    system = _text(row.get("system"), "system")
    if name in ("messages", "conversations"):
        messages = _messages(row[name], name)
    else:
        first, last = FORMATS[name]
        parts = [_text(row[first], first), _text(row.get("input"), "input") if name == "instruction" else ""]
        asked = "\n\n".join(part for part in parts if part)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row[last], last)}]
        messages = messages if asked else []
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if messages and all(message["role"] != "assistant" for message in messages):
        raise ValueError(" has no message of the assistant")
    return messages if any(m["content"].strip() for m in messages if m["role"] == "assistant") else []


def question_of(row: Any) -> list[dict[str, str]]:
    """Returns the messages of a row that waits for a reply: `messages` that end with the user's, or a `prompt`.

    A `prompt` may have a `system` message. Raises ValueError with a message that follows "line N".
    """
    if not isinstance(row, dict):
        raise ValueError(" is not a JSON object")
    if row.get("messages") is None and row.get("prompt") is None:
        raise ValueError(" needs the field messages or prompt")
    if row.get("messages") is None:
        messages = [{"role": "user", "content": _text(row["prompt"], "prompt")}]
        system = _text(row.get("system"), "system")
        return [{"role": "system", "content": system}, *messages] if system else messages
    messages = _messages(row["messages"], "messages")
    if messages[-1]["role"] != "user":
        raise ValueError(": the last message is not the user's; end with the message to reply to")
    return messages


def _messages(rows: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(rows, list):
        raise ValueError(f": {name} is not a list")
    if not rows:
        raise ValueError(f": {name} is empty")
    messages = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f": message {number} is not an object with role and content")
        role = row.get("role") or row.get("from")
        content = row.get("value") if row.get("content") is None else row["content"]
        if row.get("tool_calls"):
            raise ValueError(f": message {number} calls tools, which is not supported")
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f": message {number} has the unknown role {quote(role)!r}, not one of {known}")
        messages.append({"role": ROLES[role], "content": _text(content, f"the content of message {number}")})
    return messages


def _text(value: Any, what: str) -> str:
    """Returns a field as valid text; null is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f": {what} is not text")
    try:
        value.encode()
        return value
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can contain
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
