"""Prompts of the command line: texts, files, and conversations that wait for a reply. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from util.errors import UserError, user_errors
from util.values import user_path

ROWS = (".jsonl", ".ndjson")  # the names of prompt files with a conversation per line


class FilePrompt(str):
    """A prompt read from a file, with the file's name."""

    name: str

    def __new__(cls, text: str, name: str) -> FilePrompt:
        found = super().__new__(cls, text)
        found.name = name
        return found


def utf8(flag: str) -> Callable[[str], str]:
    """Returns a function that checks that the value of a flag is valid UTF-8, and returns it."""

    def check(text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as e:  # Python represents invalid bytes of the command line as surrogates
            raise UserError(f"{flag}: not UTF-8; convert it first") from e
        return text

    return check


def read_prompt_file(name: str) -> FilePrompt:
    """Reads a UTF-8 file; "-" is stdin."""
    with user_errors(f"--prompt_file={name}"):
        content = sys.stdin.buffer.read() if name == "-" else user_path(name).read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt_file={name}: not UTF-8 at byte {e.start}; convert it first") from e
    if not text:
        raise UserError(f"--prompt_file={name}: empty file; leave out the flag to start a new document")
    return FilePrompt(text, name)


def questions(prompts: Sequence[str], system: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields for each prompt its place, for error messages, and the messages to reply to.

    A prompt is a message of the user. Each line of a .jsonl file is a conversation, see `question_of`. The `system`
    message, if any, is put before conversations without one.
    """
    for prompt in prompts:
        if not isinstance(prompt, FilePrompt):
            found = [("--prompt", [{"role": "user", "content": prompt}])]
        elif prompt.name.endswith(ROWS):
            found = list(_conversations(prompt))
        else:
            text = prompt.removesuffix("\n").removesuffix("\r")
            found = [(f"--prompt_file={prompt.name}", [{"role": "user", "content": text}])]
        for place, messages in found:
            if not messages[-1]["content"].strip():
                raise UserError(f"{place}: the message is empty; give a question")
            first = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
            yield place, [*first, *messages]


def _conversations(prompt: FilePrompt) -> Iterator[tuple[str, list[dict[str, str]]]]:
    from data.prepare.conversations import question_of  # these import numpy, which --help does not need
    from data.prepare.text_files import parse_line

    for number, line in enumerate(prompt.split("\n"), 1):
        if line.strip():
            place = f"--prompt_file={prompt.name}: line {number}"
            try:
                yield place, question_of(parse_line(line.encode()))
            except ValueError as e:
                raise UserError(f"{place}{e}") from e
