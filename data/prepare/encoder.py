"""A document → token ids, fast: through splintr where it is installed and agrees with tiktoken, else through tiktoken.

tiktoken is the reference. splintr (splintr-rs on PyPI, MIT) is built from the same ranks and the same pattern and
is some four times as fast; it is asked for the same ids on a sample each time before it is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data.tokenizers.hf_json import GPT4_PATTERN
from data.tokenizers.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, Tokenizer
from util.errors import UserError

Encode = Callable[[str], np.ndarray]

# The patterns that splintr has scanners of its own for, in the spelling it knows them by: the same as tiktoken's, to
# every one of Unicode's characters (a test goes through them). What it makes of other patterns is not: its regular
# expressions know letters that tiktoken's do not.
FAST_PATTERNS = {
    GPT2_PATTERN: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    CL100K_PATTERN: re.sub(r"([+*?}])\+", r"\1", CL100K_PATTERN),  # without possessive quantifiers
    O200K_PATTERN: O200K_PATTERN,
}
LONG = 2**23  # characters; a longer document is encoded in segments
# What tokenizers have disagreed on: spaces at ends and in runs, contractions, long runs of one kind, digits, scripts
# without spaces, combining and control characters, special tokens spelled out.
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
    # Letters that Unicode 16 and 17 have added, each where it decides how the text is cut.
    *(f"a{c}'d!{c}'d 1{c} {c}x" for c in "\u088f\u0c5c\u0cdc\ua7ce\U00010940\U00016ea0\U00018d80\U0001e6c0\U000323b0"),
    "\x00\x07\x1b\x7f\x85\xa0\u200b\u200d\u2028\u3000\ufeff\ufffd",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # !?!?\n\n\n    \n" * 20,
    "a" * 3000 + " " * 3000 + "b" + "\n" * 3000 + "-" * 3000 + "7" * 3000 + "é" * 3000 + "字" * 3000,
]


def make_encoder(
    tokenizer: Tokenizer, sample: Iterable[str] = (), fast: bool = True, compared: bool = False
) -> tuple[Encode, str]:
    """A function from text to ids, (n,) uint32, and the name of what does the work.

    Special tokens in the text are text. `sample` is text to compare the fast encoder on, besides our own, unless it
    was `compared` before.
    """
    quick = _splintr(tokenizer) if fast else None
    if quick is not None:
        texts = [] if compared else [*SAMPLE, *sample]
        if all(np.array_equal(quick(text), tokenizer.encode(text)) for text in texts):
            return quick, "splintr"
    return _reference(tokenizer), "tiktoken" if tokenizer.ranks else "tokenizers"


def _reference(tokenizer: Tokenizer) -> Encode:
    def encode(text: str) -> np.ndarray:
        try:
            return np.array(tokenizer.encode(text), np.uint32)
        except BaseException as e:  # which is what a panic in Rust is
            if type(e).__name__ != "PanicException":
                raise
            raise UserError(
                f"a document with {text[:40]!r} is more than tiktoken can encode, millions of spaces in a row perhaps;"
                f" use --encoder=auto with splintr-rs installed, or leave it out"
            ) from e

    return encode


def _splintr(tokenizer: Tokenizer) -> Encode | None:
    """None if it is not installed, or does not take the tokenizer."""
    if tokenizer.ranks is None or tokenizer.pattern not in FAST_PATTERNS:
        return None
    try:
        import splintr

        core = splintr.Tokenizer.from_bytes(tokenizer.rank_file, FAST_PATTERNS[tokenizer.pattern], {})
    except (ImportError, ValueError):
        return None
    return lambda text: np.frombuffer(core.encode_flat(text), "<u4")


def split_safely(blocks: Iterable[str], pattern: str | None) -> Iterator[str]:
    """A document's text in segments of about LONG characters whose ids, put together, are those of the whole.

    The patterns of GPT-2, cl100k and GPT-4 end a piece before a space that follows no other space, and after a
    single newline between two characters that are no spaces; of other patterns that is not known, and the text stays
    whole.
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
    return pattern in (GPT2_PATTERN, CL100K_PATTERN, GPT4_PATTERN)


def _last_cut(text: str) -> int:
    """The last such place, 0 if there is none; at spaces if it can be, since most text has them."""
    end = len(text)
    while (end := text.rfind(" ", 1, end)) > 0:
        if not text[end - 1].isspace():
            return end
    end = len(text) - 1
    while (end := text.rfind("\n", 1, end)) > 0:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
    return 0
