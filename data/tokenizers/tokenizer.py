"""Tokenizers: text ↔ ids. Byte-pair encodings go through tiktoken's core, from verified files and without its network.

A tokenizer is known by its name, its size and a hash of everything that decides which ids a text gets; shards and
checkpoints carry these three, so that none is read with another. data/tokenizers/hf_json.py reads tokenizer.json files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.errors import UserError, closest, quote
from util.files import read_json
from util.hub import model_folder
from data import assets

if TYPE_CHECKING:
    from tiktoken import Encoding

    from data.tokenizers.hf_json import LibraryEncoding

GPT2_END_OF_TEXT = 50256
END_OF_TEXT = "<|endoftext|>"
# Sentinels of fill-in-the-middle (Bavarian et al. 2022), under the names and in the order of OpenAI's vocabularies.
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
# Patterns as tiktoken 0.14 spells them: kept here, so that another version of it changes no tokenizer's hash.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORD_ENDS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORD_ENDS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIM = (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX)
# Of each name: its file in data/assets.py, its pattern, its special tokens.
NAMED = {
    "gpt2": ("gpt2.tiktoken", GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "gpt2-fim": ("gpt2.tiktoken", GPT2_PATTERN, {t: 50256 + i for i, t in enumerate((END_OF_TEXT, *_FIM))}),
    "cl100k_base": (
        "cl100k_base.tiktoken",
        CL100K_PATTERN,
        {t: 100257 + i for i, t in enumerate((END_OF_TEXT, *_FIM))} | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": ("o200k_base.tiktoken", O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
NAMES = tuple(NAMED)
# Their sizes and hashes, so that no file need be read to say which tokenizer is meant.
NAMED_IDENTITIES = {
    name: {"name": name, "vocab_size": vocab_size, "sha256": sha256}
    for name, vocab_size, sha256 in (
        ("gpt2", 50257, "1408ad06293e4f889ae5021e1936bdfa102797c65136f62ba5036fa0536757d6"),
        ("gpt2-fim", 50260, "d07164a5a0c386b9128382a71bed07c0b1ad38fb306a87cc6395999aa349eef5"),
        ("cl100k_base", 100277, "e84784ccb0ad25af93beb949a01b2389dbfa52dc7cee7806bbb1e66f2ba2a800"),
        ("o200k_base", 200019, "3a872c4f24eabc5b3fecd01c9affc11ab48b13d28b8f55cee96fdbdcf2560a1a"),
    )
}


@dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding. Special tokens are ids beside it: text never turns into one.

    `ranks` and `pattern` are None where tiktoken's core would not give the ids that the tokenizer.json defines;
    `library` then encodes, slower.
    """

    name: str  # one of NAMES, or the path of a tokenizer.json
    ranks: dict[bytes, int] | None  # of each token, which is its id
    pattern: str | None  # the regular expression that cuts text into the pieces within which tokens are merged
    special: dict[str, int]
    end_of_text: int
    library: LibraryEncoding | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # what a copy needs to be loaded again; none for a name
    prefix: list[int] = field(default_factory=list)  # what its file puts before a text; not part of `encode`

    @property
    def before_text(self) -> list[int]:
        """What a text begins with that a model is to continue: a begin-of-text token, or the end of another text."""
        return self.prefix or [self.end_of_text]

    @property
    def before_document(self) -> list[int]:
        """What stands before each document in shards: the end of another, and what the file wants before a text."""
        return [self.end_of_text, *(i for i in self.prefix if i != self.end_of_text)]

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of each token that is not special."""
        if self.ranks is None:
            assert self.library is not None, "a tokenizer without ranks has the library to encode with"
            return self.library.token_bytes
        return {rank: token for token, rank in self.ranks.items()}

    @cached_property
    def vocab_size(self) -> int:
        """All ids are below this."""
        return max(*self.token_bytes, *self.special.values()) + 1

    @cached_property
    def sha256(self) -> str:
        if self.ranks is not None and self.pattern is not None:
            digest = hashlib.sha256(self.pattern.encode())
            digest.update(self.rank_file)
            digest.update(repr(sorted(self.special.items())).encode())
            found = digest.hexdigest()
            # A file that says the same as a named one, as an export of it does, is that one.
            if not self.files or found in (identity["sha256"] for identity in NAMED_IDENTITIES.values()):
                return found
        # Else of the file, so that it does not depend on which core encodes.
        return json_sha256(self.files["tokenizer.json"], self.end_of_text)

    @property
    def identity(self) -> dict[str, Any]:
        """What shards and checkpoints say of their tokenizer."""
        return {"name": self.name, "vocab_size": self.vocab_size, "sha256": self.sha256}

    @cached_property
    def rank_file(self) -> bytes:
        """The ranks as a file in tiktoken's form."""
        assert self.ranks is not None, "only a tokenizer with ranks has a file of them"
        return rank_file(self.ranks)

    @cached_property
    def encoding(self) -> Encoding | LibraryEncoding:
        """What encodes: `encode_ordinary`, `encode_ordinary_batch` and `decode_bytes`, as tiktoken calls them."""
        if self.library is not None:
            return self.library
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text from its beginning on, with what the tokenizer puts there; nothing, for most."""
        return [*self.prefix, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Ids of the text; the name of a special token in it is text like any other."""
        ids: list[int] = self.encoding.encode_ordinary(text)
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that ids of this tokenizer stand for; a special token stands for its name."""
        content: bytes = self.encoding.decode_bytes(ids)
        return content

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; those the tokenizer does not have (a larger --vocab_size) show as �.

        SentencePiece's encoders put a space before the text, which is taken away again.
        """
        known = self._known
        parts, run = [], []
        for i in ids:
            if i in known:
                run.append(i)
            else:
                parts += [self.decode_bytes(run).decode("utf-8", errors="replace"), "�"]
                run = []
        text = "".join([*parts, self.decode_bytes(run).decode("utf-8", errors="replace")])
        return text.removeprefix(" ") if self.library is not None and self.library.prepends_space else text

    @cached_property
    def _known(self) -> set[int]:
        return {*self.token_bytes, *self.special.values()}

    def byte_lengths(self, vocab_size: int) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64; special and unused ids count 0."""
        lengths = np.zeros(vocab_size, dtype=np.int64)
        special = set(self.special.values())
        for i, token in self.token_bytes.items():
            if i < vocab_size and i not in special:
                lengths[i] = len(token)
        return lengths


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The ranks in tiktoken's file form: base64(token) and rank on each line, in rank order."""
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda item: item[1]))


def read_rank_file(content: bytes) -> dict[bytes, int]:
    """The inverse. Not tiktoken's own reader: that keeps copies in a temporary folder that everybody can write to."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}


def json_sha256(content: bytes, end_of_text: int) -> str:
    """Hash of what a tokenizer.json says of the ids, whatever its spacing and the order of its keys."""
    data = json.loads(content)
    deciding = [data.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return hashlib.sha256(json.dumps([*deciding, end_of_text], sort_keys=True).encode()).hexdigest()


def load_tokenizer(name: str = "gpt2", vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer called `name`, or that at the path `name`: a tokenizer.json, or the folder that holds one, or
    llama2.c's tokenizer.bin. hf:NAME is that of a model of the hub, from where it is fetched.

    Raises UserError if there is none, if its files cannot be had or read, or if a model of `vocab_size`
    must be another one's.
    """
    if name in NAMES:
        tokenizer = _load_named(name)
    elif name.startswith("hf:"):
        tokenizer = _load_path(model_folder(name.removeprefix("hf:"), f"--tokenizer={name}")[0])
    elif os.path.exists(path := os.path.expanduser(name)):
        tokenizer = _load_path(Path(path))
    else:
        near = closest(name, (*NAMES, "none"))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMES)}, and paths of a tokenizer.json"
        raise UserError(f"--tokenizer={quote(name)}: no such tokenizer or file; {hint}")
    if vocab_size is not None and not tokenizer.vocab_size <= vocab_size <= tokenizer.vocab_size + 2**14:
        raise UserError(
            f"--vocab_size={vocab_size} is not that of tokenizer {name}; give --vocab_size={tokenizer.vocab_size}"
            f" or a little more"
        )
    return tokenizer


def _load_path(path: Path) -> Tokenizer:
    from data.tokenizers.llama2c import load_llama2c_tokenizer
    from data.tokenizers.hf_json import load_tokenizer_json

    return load_llama2c_tokenizer(path) if path.suffix == ".bin" and path.is_file() else load_tokenizer_json(path)


def _load_named(name: str) -> Tokenizer:
    file, pattern, special = NAMED[name]
    ranks = read_rank_file(assets.fetch(file).read_bytes())
    return Tokenizer(name, ranks, pattern, special, special[END_OF_TEXT])


def check_tokenizer_of(paths: Iterable[Path], identity: dict[str, Any], flag: str) -> None:
    """Raises UserError if a manifest.json beside one of the shards says that another tokenizer made them.

    `identity` is the run's, with "name" alone where its files were not read. Shards without a manifest of ours
    are not judged.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        made = tokenizer_in_manifest(folder)
        if made and not same_tokenizer(made, identity):
            raise UserError(
                f"--{flag}: the shards in {folder} were made with tokenizer {quote(made['name'])}, but"
                f" --tokenizer={identity['name']}{'' if made['name'] != identity['name'] else ', another file now'};"
                f" give --tokenizer={quote(made['name'])}, or other shards"
            )


def same_tokenizer(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two identities are one tokenizer's: by hash, or by name where one of them was only named."""
    return a["sha256"] == b["sha256"] if "sha256" in a and "sha256" in b else a["name"] == b["name"]


def check_same_tokenizer(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint was trained on the ids of another tokenizer; `none` is not judged."""
    if not isinstance(saved.get("name"), str):
        raise UserError("what the checkpoint says of its tokenizer is damaged; use another --output_dir")
    if "none" not in (saved["name"], now["name"]) and not same_tokenizer(saved, now):
        raise UserError(
            f"--tokenizer={now['name']}, but the checkpoint was trained with {quote(saved['name'])}"
            f"{' as it was then' if now['name'] == saved['name'] else ''}; set it back, or use another --output_dir"
        )


def tokenizer_in_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest.json in a folder of shards says of their tokenizer: an identity, or in the first ones its name.

    None if there is none of ours.
    """
    try:
        made = read_json(folder / "manifest.json")["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if made in ("gpt2", "gpt2-fim"):
        return {"name": made}
    ours = isinstance(made, dict) and isinstance(made.get("name"), str) and isinstance(made.get("sha256"), str)
    return made if ours else None
