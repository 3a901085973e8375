"""Chat templates: conversations to token ids, and which of the ids a model learns to write.

A template is a Jinja program in the format of Hugging Face's tokenizer_config.json and chat_template.jinja. It turns
messages, {"role", "content"}, into text in which the names of special tokens stand for the tokens. Such names within a
message are ordinary text, so that a message cannot end its turn or begin another.

The assistant's messages are counted, each with the token that ends its turn. If the template marks them with
{% generation %}, the marks decide. Otherwise the conversation is rendered up to each reply, with the prompt for a
reply. The whole text must begin with this text, and continues with the reply.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from data.tokenizers.export import extended_files
from data.tokenizers.hf_json import (
    ENDS_OF_TEXT,
    ROLES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    library_encoding,
    pre_tokenizers,
    read_tokenizer_json,
)
from data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer
from util.errors import UserError, closest, quote, user_errors

Message = dict[str, str]  # "role" and "content"
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
        " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
# The answer of strftime_now, a function for templates, where ids must not depend on the day: the date that Llama 3.1's
# template uses without this function.
FIXED_DATE = datetime(2024, 7, 26)
SPECIAL_NAME = re.compile(r"<\|\w+\|>")
PROBE = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
# Private-use characters, which stand in a rendered text for something else.
RESERVED = re.compile("[\U0010ff00-\U0010fffd]")
BEGIN, END, CHANGED = "\U0010fff0", "\U0010fff1", "\U0010fff2"  # marks of {% generation %}; see _end_of_turn
DISGUISES = 0x10FF00  # the first of the characters that stand for the first letter of a special token's name


@cache
def _environment() -> Any:
    """Returns the sandbox in which templates run, with what transformers offers to templates."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: its output stands between BEGIN and END."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template. `name` is one of BUILT_IN, `tokenizer`, or a path."""

    name: str
    source: str

    @property
    def fingerprint(self) -> dict[str, str]:
        """Returns what shards store about their template."""
        return {"name": self.name, "sha256": hashlib.sha256(self.source.encode()).hexdigest()}

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as e:
            raise UserError(f"--chat_template={self.name}: line {e.lineno}: {e.message}") from e

    def render(self, messages: Sequence[Message], names: dict[str, str], prompt: bool = False, now: Any = None) -> str:
        """Returns the text of the messages, with the beginning of a reply if `prompt`. Raises ValueError if it fails.

        `names` are the variables bos_token, eos_token and so on. `now` is the time, FIXED_DATE by default.
        """
        template = self._compiled
        variables = {**names, "strftime_now": (now or FIXED_DATE).strftime, "add_generation_prompt": prompt}
        try:
            return str(template.render(messages=messages, **variables))
        except Exception as e:  # of Jinja, and what Python raises for the template's operations
            raise ValueError(f": the chat template fails ({e or type(e).__name__})") from e


def own_template(tokenizer: Tokenizer) -> str | None:
    """Returns the source of a tokenizer's own template, or None if it has none."""
    own: str | None = json.loads(tokenizer.files.get(TOKENIZER_CONFIG, b"{}")).get("chat_template")
    return own or None


def find_template(choice: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the template of --chat_template. "" means the tokenizer's own, or ChatML if it has none."""
    own = own_template(tokenizer)
    if own and choice in ("", "tokenizer"):
        return ChatTemplate("tokenizer", own)
    if choice == "tokenizer":
        raise UserError(
            f"--chat_template=tokenizer: {tokenizer.name} has no chat template; give one of {', '.join(BUILT_IN)}, or a"
            f" file"
        )
    name = choice or "chatml"
    if name in BUILT_IN:
        return ChatTemplate(name, BUILT_IN[name])
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        near = closest(name, (*BUILT_IN, "tokenizer"))
        hint = f"did you mean {near}?" if near else f"give one of {', '.join(BUILT_IN)}, tokenizer, or a file"
        raise UserError(f"--chat_template={quote(name)}: no such template or file; {hint}")
    with user_errors(f"--chat_template={name}"):
        source = path.read_bytes().decode(errors="replace")
    if path.suffix == ".json":
        try:
            source = json.loads(source)["chat_template"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"--chat_template={name}: not a JSON file with a field chat_template") from e
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"--chat_template={name}: empty, or not one text; give a Jinja template")
    return ChatTemplate(name, source)


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the names of the BOS, end-of-text, padding and unknown tokens, as templates know them."""
    if not tokenizer.files:
        return {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}  # as transformers has them for GPT-2
    config = json.loads(tokenizer.files[TOKENIZER_CONFIG])
    return {role: config[role] for role in ("eos_token", *ROLES) if role in config}


def render_probe(template: ChatTemplate, names: dict[str, str], to: int = len(PROBE), prompt: bool = False) -> str:
    """Renders the first `to` messages of PROBE, without its system message if the template refuses one."""
    try:
        return template.render(PROBE[:to], names, prompt)
    except ValueError:
        try:
            return template.render(PROBE[1:to], names, prompt)
        except ValueError as e:
            raise UserError(f"--chat_template={template.name}{e}") from e


def prepare_tokenizer(tokenizer: Tokenizer, template: ChatTemplate, folder: Path) -> tuple[Tokenizer, dict[str, bytes]]:
    """Returns the tokenizer for a template, and the files to write to `folder`.

    Names of the form <|name|> that the template writes become special tokens, unless it is the tokenizer's own. The
    end-of-text token separates conversations. If the template writes it within a conversation, another one takes its
    place.
    """
    names = special_names(tokenizer)
    text = render_probe(template, names) + render_probe(template, names, prompt=True)
    new = [] if template.name == "tokenizer" else sorted(set(SPECIAL_NAME.findall(text)) - tokenizer.special.keys())
    end = next(name for name, i in tokenizer.special.items() if i == tokenizer.end_of_text)
    source = template.source
    if end in render_probe(template, names).removeprefix(end):
        free = [name for name in ENDS_OF_TEXT if name not in text]
        end = next((name for name in free if name in tokenizer.special), free[0])
        new += [end] if end not in tokenizer.special else []
        # The first newline after a block is removed.
        source = f"{{% set eos_token = {json.dumps(names['eos_token'])} %}}\n{source}"
    files = extended_files(tokenizer, new, end, source)
    read = read_tokenizer_json(str(folder), folder / TOKENIZER, files[TOKENIZER], json.loads(files[TOKENIZER_CONFIG]))
    return read, files


class Chat:
    """A tokenizer and its chat template: conversations to ids."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, now: datetime | None = None):
        self.tokenizer, self.template, self.now = tokenizer, template, now
        self.names = special_names(tokenizer)
        self.after_special = _without_first_space(tokenizer)
        added = json.loads(tokenizer.files.get(TOKENIZER, b"{}")).get("added_tokens") or []
        flags = {token["content"]: token for token in added}
        self._special = _pattern({name: flags.get(name, {}) for name in tokenizer.special})
        # Tokens that no message can contain: special ones, and others that the template writes around messages. Tokens
        # such as <think>, which a tokenizer.json lists with "special": false, may be in messages.
        around = render_probe(template, self.names, to=4)
        control = [name for name in tokenizer.special if flags.get(name, {}).get("special", True) or name in around]
        self._control = _pattern({name: {} for name in control})
        self._begins = re.compile(f"(?={self._control.pattern})")
        self._disguise = {ord(c): chr(DISGUISES + i) for i, c in enumerate(sorted({name[0] for name in control}))}
        self._undisguise = {ord(disguise): chr(c) for c, disguise in self._disguise.items()}

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation, and for each whether it is counted.

        Raises ValueError with a message that follows the place of the conversation, such as "line 3".
        """
        messages = [{**message, "content": self._quote(message["content"])} for message in messages]
        text = self._render(messages)
        if BEGIN in text:
            text, spans = _marked(text)
        else:
            spans = self._replies(messages, text)
        return self._tokens(text, spans)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model writes the next reply."""
        quoted = [{**message, "content": self._quote(message["content"])} for message in messages]
        text = self._render(quoted, prompt=True)
        return self._tokens(_marked(text)[0], [])[0]

    def end_of_reply(self) -> tuple[str, int | None]:
        """Returns the text that the template writes after a reply, and the special token that ends the reply.

        The text precedes the token and is often "". Without a special token (None) the text itself ends the reply: it
        is a name of the form <|name|> that the tokenizer lacks, or everything up to the next message.
        """
        messages = [PROBE[1], {"role": "assistant", "content": CHANGED}, {"role": "user", "content": CHANGED}]
        try:
            text = self._render(messages)
        except ValueError:
            try:
                text = self._render([PROBE[0], *messages])
            except ValueError as e:
                raise UserError(f"--chat_template={self.template.name}{e}") from e
        _, *parts = _marked(text)[0].split(CHANGED)
        after = parts[0] if len(parts) > 1 else ""
        if match := self._control.search(after):
            assert match.lastindex, "one of the groups has matched"
            return after[: match.start()], self.tokenizer.special[match[match.lastindex]]
        name = SPECIAL_NAME.search(after)
        return after[: name.end()] if name else after.rstrip(), None

    def begins_with(self, name: str) -> bool:
        """Returns whether the template writes the token `name` before a conversation."""
        return render_probe(self.template, self.names).startswith(name)

    def unknown_names(self) -> list[str]:
        """Returns the names of the form <|name|> that the template writes and the tokenizer does not have."""
        text = render_probe(self.template, self.names) + render_probe(self.template, self.names, prompt=True)
        return sorted(set(SPECIAL_NAME.findall(text)) - self.tokenizer.special.keys())

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self.template.render(messages, self.names, prompt, self.now)

    def _quote(self, content: str) -> str:
        """Replaces the first letter of each special token's name, so that rendering and splitting do not see it."""
        if found := RESERVED.search(content):
            raise ValueError(f" contains U+{ord(found[0]):X}, which is reserved; remove it")
        starts = [match.start() for match in self._begins.finditer(content)]
        letters = list(content) if starts else []
        for at in starts:
            letters[at] = self._disguise[ord(letters[at])]
        return "".join(letters) if starts else content

    def _replies(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Returns start and end, in `text`, of each assistant message with the token that ends its turn."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:i], prompt=True)
                if not text.startswith(before):
                    raise ValueError(
                        f": the chat template writes the messages before message {i + 1} differently when"
                        f" more follow; mark the replies in it with {{% generation %}}"
                    )
                spans.append((len(before), self._end_of_turn(messages, i, text, len(before))))
        return spans

    def _end_of_turn(self, messages: Sequence[Message], i: int, text: str, start: int) -> int:
        """Returns the end of message i, which starts at `start`: after its first special token, if it has one."""
        limit = len(text)  # where the content of the next message begins
        if i + 1 < len(messages):
            following = {**messages[i + 1], "content": CHANGED + messages[i + 1]["content"]}
            limit = self._render([*messages[: i + 1], following, *messages[i + 2 :]]).find(CHANGED)
        match = self._control.search(text, start, max(start, limit))
        if match and (match.start() > start or not messages[i]["content"].strip()):
            return match.end()
        through = self._render(messages[: i + 1])
        if match or not text.startswith(through) or len(through) <= start:
            raise ValueError(
                f": the chat template does not show where message {i + 1} begins and ends: it ignores"
                f" add_generation_prompt, or changes what it wrote; mark the replies in it with {{% generation %}}"
            )
        return len(through)

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Returns the ids of a rendered text, and whether each has a character within `spans`."""
        inside = bytearray(len(text))
        for start, end in spans:
            inside[start:end] = b"\1" * (end - start)
        ids: list[int] = []
        counted: list[bool] = []
        at = 0
        for match in (*self._special.finditer(text), None):
            piece = text[at : match.start() if match else len(text)].translate(self._undisguise)
            if piece:
                tokenizer = self.after_special if at else self.tokenizer
                found = tokenizer.encode(piece)
                ids += found
                counted += _inside(tokenizer, piece, found, inside[at : at + len(piece)])
            if match:
                assert match.lastindex, "one of the groups has matched"
                start, end = match.span(match.lastindex)
                ids.append(self.tokenizer.special[text[start:end]])
                counted.append(1 in inside[start:end])
                at = match.end()
        return ids, counted


def _inside(tokenizer: Tokenizer, piece: str, ids: list[int], inside: bytearray) -> list[bool]:
    """Returns for each token of a text whether one of its characters is inside."""
    if 1 not in inside or 0 not in inside:
        return [1 in inside] * len(ids)
    if tokenizer.library is not None:
        return [1 in inside[a:b] for a, b in tokenizer.library.spans(piece)]
    in_bytes = bytearray(len(piece.encode()))
    for run in re.finditer(b"\1+", inside):
        start, end = (len(piece[:at].encode()) for at in run.span())
        in_bytes[start:end] = b"\1" * (end - start)
    ends = [0, *accumulate(len(tokenizer.token_bytes[i]) for i in ids)]
    return [1 in in_bytes[a:b] for a, b in pairwise(ends)]


def _without_first_space(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer for text after a special token: some put a space only before the first text."""
    data = json.loads(tokenizer.files.get(TOKENIZER, b"{}"))
    steps = [step for step in pre_tokenizers(data) if step.get("prepend_scheme") == "first"]
    if not steps or tokenizer.library is None:
        return tokenizer
    for step in steps:
        step["prepend_scheme"] = "never"
    return replace(tokenizer, library=library_encoding(data, tokenizer.token_bytes, tokenizer.special))


def _pattern(flags: dict[str, dict[str, Any]]) -> re.Pattern[str]:
    """Returns a pattern that finds names of tokens, the longest first. The only group that matched is the name.

    `flags` are those of a tokenizer.json by name: with lstrip or rstrip, the spaces beside the name belong to it.
    """
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name in sorted(flags, key=lambda name: (-len(name), name)):
        key = bool(flags[name].get("lstrip")), bool(flags[name].get("rstrip"))
        groups.setdefault(key, []).append(re.escape(name))
    space = {True: r"\s*", False: ""}
    return re.compile("|".join(f"{space[a]}({'|'.join(names)}){space[b]}" for (a, b), names in groups.items()))


def _marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Removes BEGIN and END from a text. Returns the rest, and start and end of what was between them."""
    parts = re.split(f"[{BEGIN}{END}]", text)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return "".join(parts), list(zip(ends[1:-1:2], ends[2:-1:2], strict=True))
