"""The Tokenizer class: text to token ids and back, through tiktoken's core or Hugging Face's `tokenizers`.

data/tokenizers/load.py loads a tokenizer by name or from a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from util.errors import UserError, quote

if TYPE_CHECKING:
    from tiktoken import Encoding

    from data.tokenizers.hf_json import LibraryEncoding

GPT2_END_OF_TEXT = 50256
END_OF_TEXT = "<|endoftext|>"
# Sentinels of fill-in-the-middle (Bavarian et al. 2022). OpenAI's vocabularies have them under these names.
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
# The patterns of tiktoken 0.14, copied so that another version of tiktoken does not change a tokenizer's hash.
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
BYTE_RANKS = {bytes([b]): b for b in range(256)}  # of the tokenizer `bytes`
# The fingerprints of the named tokenizers, known without reading their files.
NAMED_FINGERPRINTS: dict[str, dict[str, Any]] = {
    name: {"name": name, "vocab_size": vocab_size, "sha256": sha256}
    for name, vocab_size, sha256 in (
        ("gpt2", 50257, "1408ad06293e4f889ae5021e1936bdfa102797c65136f62ba5036fa0536757d6"),
        ("gpt2-fim", 50260, "d07164a5a0c386b9128382a71bed07c0b1ad38fb306a87cc6395999aa349eef5"),
        ("cl100k_base", 100277, "e84784ccb0ad25af93beb949a01b2389dbfa52dc7cee7806bbb1e66f2ba2a800"),
        ("bytes", 257, "a77824b93dac956555b190477aa198366d17fe4ec48aa1c34e57b037a1f244b8"),
        ("o200k_base", 200019, "3a872c4f24eabc5b3fecd01c9affc11ab48b13d28b8f55cee96fdbdcf2560a1a"),
    )
}


MAX_UNUSED_IDS = 2**14  # a model's vocabulary may have this many more ids than its tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """A byte-pair encoding. Text never encodes to a special token, also where it contains the name of one.

    tiktoken's core encodes with `ranks` and `pattern`. Both are None where the core would give other ids than the
    tokenizer.json defines; the slower `library` encodes then.
    """

    name: str  # one of load.NAMES, or a path
    ranks: dict[bytes, int] | None  # the bytes of each token that is not special: its id, which is also its merge rank
    pattern: str | None  # the regular expression that splits text into pieces; tokens are merged within a piece
    special: dict[str, int]
    end_of_text: int
    library: LibraryEncoding | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer.json and its config; empty for a named tokenizer
    prefix: list[int] = field(default_factory=list)  # the ids that its post-processor puts before a text, such as BOS
    bos: int | None = None  # the BOS token that its configuration names

    @property
    def bos_tokens(self) -> list[int]:
        """Returns the ids that start a document: what the post-processor puts there, else BOS, else end-of-text.

        Evaluation, generation, data preparation and export all use this.
        """
        return self.prefix or [self.end_of_text if self.bos is None else self.bos]

    @property
    def document_prefix(self) -> list[int]:
        """Returns the ids before each document in shards: end-of-text, then BOS if the tokenizer has one."""
        return [self.end_of_text, *(i for i in self.bos_tokens if i != self.end_of_text)]

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """Maps the id of each token that is not special to its bytes."""
        if self.ranks is None:
            assert self.library is not None, "a tokenizer without ranks has the library to encode with"
            return self.library.token_bytes
        return {rank: token for token, rank in self.ranks.items()}

    @cached_property
    def is_bytes(self) -> bool:
        """Returns whether the tokens are the 256 bytes, in order."""
        return self.ranks == BYTE_RANKS

    @cached_property
    def missing_bytes(self) -> bytes:
        """Returns the bytes that have no token. SmolLM's tokenizers, for example, lack some control characters."""
        known = {token for token in self.token_bytes.values() if len(token) == 1}
        return bytes(b for b in range(256) if bytes([b]) not in known)

    @cached_property
    def vocab_size(self) -> int:
        """Returns the largest id plus one."""
        return max(*self.token_bytes, *self.special.values()) + 1

    @cached_property
    def sha256(self) -> str:
        """Hashes everything that decides which ids a text gets."""
        if self.ranks is not None and self.pattern is not None:
            digest = hashlib.sha256(self.pattern.encode())
            digest.update(self.rank_file)
            digest.update(repr(sorted(self.special.items())).encode())
            found = digest.hexdigest()
            # A file that defines a named tokenizer, such as an export of gpt2, has the hash of the named one.
            if not self.files or found in (named["sha256"] for named in NAMED_FINGERPRINTS.values()):
                return found
        # Otherwise the hash of the file, which does not depend on the core that encodes.
        return json_sha256(self.files["tokenizer.json"], self.end_of_text)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns what shards and checkpoints store about their tokenizer."""
        return {"name": self.name, "vocab_size": self.vocab_size, "sha256": self.sha256}

    @cached_property
    def rank_file(self) -> bytes:
        """Returns the ranks in tiktoken's file format."""
        assert self.ranks is not None, "only a tokenizer with ranks has a rank file"
        return rank_file(self.ranks)

    @cached_property
    def encoding(self) -> Encoding | LibraryEncoding | ByteEncoding:
        """Returns the encoder, with tiktoken's methods encode_ordinary, encode_ordinary_batch and decode_bytes."""
        if self.library is not None:
            return self.library
        if self.is_bytes:
            return ByteEncoding(self.special)
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def encode_whole(self, text: str) -> list[int]:
        """Encodes a complete text: `prefix`, which most tokenizers do not have, and the text's ids."""
        return [*self.prefix, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Encodes text. The name of a special token is encoded as ordinary text.

        A text that contains one of `missing_bytes` is an error. The encoders would drop the character or panic.
        """
        if (at := self.find_missing_byte(text)) is not None:
            raise UserError(
                f"--tokenizer={self.name}: the character '{quote(text[at])}' has no token, in the text"
                f" '{quote(text[max(0, at - 30) : at + 10])}'; remove it, or use another tokenizer"
            )
        ids: list[int] = self.encoding.encode_ordinary(text)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes text in which the name of a special token, such as <|endoftext|>, stands for the token."""
        names = "|".join(re.escape(name) for name in sorted(self.special, key=len, reverse=True))
        parts = re.split(f"({names})", text) if names else [text]
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self.encode(part))]

    def find_missing_byte(self, text: str) -> int | None:
        """Returns the index of the first character that contains a byte without a token, or None."""
        content = text.encode("utf-8", "replace") if self.missing_bytes else b""
        if len(content.translate(None, self.missing_bytes)) == len(content):
            return None
        return next(i for i, c in enumerate(text) if set(c.encode("utf-8", "replace")) & set(self.missing_bytes))

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Returns the bytes of the tokens. A special token gives its name."""
        content: bytes = self.encoding.decode_bytes(ids)
        return content

    def decode(self, ids: list[int]) -> str:
        """Decodes ids to text. Ids outside the vocabulary, which a padded --vocab_size allows, give �.

        SentencePiece encoders put a space before the text; it is removed.
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
        """Returns the number of UTF-8 bytes of each id, (vocab_size,) int64; 0 for special and unused ids."""
        lengths = np.zeros(vocab_size, dtype=np.int64)
        special = set(self.special.values())
        for i, token in self.token_bytes.items():
            if i < vocab_size and i not in special:
                lengths[i] = len(token)
        return lengths


class ByteEncoding:
    """An encoder of text to its UTF-8 bytes, with the methods of tiktoken's Encoding.

    It has no merges, so it needs no pattern, and the length of words and of runs of spaces does not matter.
    """

    def __init__(self, special: dict[str, int]):
        self._bytes = {b: token for token, b in BYTE_RANKS.items()} | {i: name.encode() for name, i in special.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError:  # half a surrogate pair: U+FFFD, as in tiktoken
            return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def encode_ordinary_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids)


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """Writes ranks in tiktoken's file format: base64(token) and rank on each line, in rank order."""
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda item: item[1]))


def read_rank_file(content: bytes) -> dict[bytes, int]:
    """Reads tiktoken's file format. tiktoken's own reader caches files in a world-writable temporary folder."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}


def json_sha256(content: bytes, end_of_text: int) -> str:
    """Hashes the parts of a tokenizer.json that decide the ids, regardless of white space and key order."""
    data = json.loads(content)
    deciding = [data.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return hashlib.sha256(json.dumps([*deciding, end_of_text], sort_keys=True).encode()).hexdigest()
