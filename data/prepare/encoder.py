"""Fast encoding of documents: splintr if it is installed and agrees with tiktoken, otherwise tiktoken.

splintr (splintr-rs on PyPI, MIT license) is about four times as fast as tiktoken. It gets tiktoken's ranks and pattern,
and each command compares the two on a sample of text before it uses splintr.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data.tokenizers.hf_json import GPT4_PATTERN
from data.tokenizers.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, Tokenizer
from util.errors import UserError

Encode = Callable[[str], np.ndarray]


# The patterns for which splintr has hand-written scanners, in splintr's spelling. A test compares them with tiktoken on
# every Unicode character. With other patterns splintr uses its regular expressions, which know other letters than
# tiktoken's.
FAST_PATTERNS = {
    GPT2_PATTERN: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    CL100K_PATTERN: re.sub(r"([+*?}])\+", r"\1", CL100K_PATTERN),  # without possessive quantifiers
    O200K_PATTERN: O200K_PATTERN,
}
LONG = 2**23  # characters; longer documents are split
# Text on which tokenizers have disagreed: spaces at ends and in runs, contractions, long runs of one kind, digits,
# scripts without spaces, combining and control characters, names of special tokens.
SAMPLE = [
    "",
    " ",
    "\n",
    " \n\n  \t x  \r\n y   ",
    "It's what we'll've'd, I'M SURE THEY'RE: don't 'tis",
    "3.14159 1,000,000 12345678901234567890 ١٢٣ ½ Ⅷ",
    "<|endoftext|> <|fim_prefix|> </s> [PAD]",
    "naïve café e\u0301 Å ﬁ straße ИЙ ελληνικά עברית العربية हिन्दी ไทย",
    "東京特許許可局 한국어 カタカナ ひらがな 👩‍👩‍👧 🇫🇷 👍🏽 \U0001d400\U0010ffff",
    # Letters new in Unicode 16 and 17, in places where they decide how text is split.
    *(f"a{c}'d!{c}'d 1{c} {c}x" for c in "\u088f\u0c5c\u0cdc\ua7ce\U00010940\U00016ea0\U00018d80\U0001e6c0\U000323b0"),
    "\x00\x07\x1b\x7f\x85\xa0\u200b\u200d\u2028\u3000\ufeff\ufffd",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # !?!?\n\n\n    \n" * 20,
    "a" * 3000 + " " * 3000 + "b" + "\n" * 3000 + "-" * 3000 + "7" * 3000 + "é" * 3000 + "字" * 3000,
]


def make_encoder(
    tokenizer: Tokenizer, sample: Iterable[str] = (), fast: bool = True, compared: bool = False
) -> tuple[Encode, str]:
    """Returns a function from text to ids, (n,) uint32, and the name of the library behind it.

    Names of special tokens are encoded as ordinary text. The fast encoder is compared with tiktoken on SAMPLE and
    `sample`, unless the caller has `compared` them before.
    """
    if tokenizer.is_bytes:
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.uint32), "bytes"
    splintr = _splintr(tokenizer) if fast else None
    if splintr is not None:
        texts = [] if compared else [*SAMPLE, *sample]
        if all(np.array_equal(splintr(text), tokenizer.encode(text)) for text in texts):
            return splintr, "splintr"
    return _reference(tokenizer), "tiktoken" if tokenizer.ranks else "tokenizers"


def _reference(tokenizer: Tokenizer) -> Encode:
    def encode(text: str) -> np.ndarray:
        try:
            return np.array(tokenizer.encode(text), np.uint32)
        except BaseException as e:  # a panic in Rust is a BaseException
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(
                f"tiktoken cannot encode a document with {text[:40]!r}, perhaps because of a million spaces in a row;"
                f" skip it with --skip_bad, or install splintr-rs and use --encoder=auto"
            ) from e

    return encode


def _splintr(tokenizer: Tokenizer) -> Encode | None:
    """Returns splintr's encoder, or None if splintr is not installed or does not support the tokenizer."""
    if tokenizer.ranks is None or tokenizer.pattern not in FAST_PATTERNS or tokenizer.missing_bytes:
        return None
    try:
        import splintr

        core = splintr.Tokenizer.from_bytes(tokenizer.rank_file, FAST_PATTERNS[tokenizer.pattern], {})
    except (ImportError, ValueError):
        return None
    return lambda text: np.frombuffer(core.encode_flat(text), "<u4")


def split_safely(blocks: Iterable[str], pattern: str | None) -> Iterator[str]:
    """Splits a document into segments of about LONG characters without changing its token ids.

    The patterns of GPT-2, cl100k and GPT-4 never match across two places: before a space that follows a character other
    than a space, and after a single newline between two such characters. With other patterns the text is not split.
    """
    held: list[str] = []
    length = 0
    for block in (whole[i : i + LONG] for whole in blocks for i in range(0, len(whole), LONG)):
        held.append(block)
        length += len(block)
        if length < LONG or not has_safe_cuts(pattern):
            continue
        text = "".join(held)
        cut = _last_cut(text)
        if cut:
            yield text[:cut]
        held = [text[cut:]]
        length = len(text) - cut
    if length:
        yield "".join(held)


def has_safe_cuts(pattern: str | None) -> bool:
    """Returns whether text can be split safely with this pattern."""
    return pattern in (GPT2_PATTERN, CL100K_PATTERN, GPT4_PATTERN)


def _last_cut(text: str) -> int:
    """Returns the last safe place to split, or 0 if there is none. Prefers spaces, which most text has."""
    end = len(text)
    while (end := text.rfind(" ", 1, end)) > 0:
        if not text[end - 1].isspace():
            return end
    end = len(text) - 1
    while (end := text.rfind("\n", 1, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    return 0
