"""Fill-in-the-middle: rearranged documents that teach a left-to-right model to fill a gap.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255). A document is
split at two random characters into prefix, middle and suffix. The parts are encoded separately and ordered
prefix-suffix-middle (PSM) or suffix-prefix-middle (SPM; the variant of appendix D, which shares PSM's sentinels).
"""

from __future__ import annotations

import hashlib

from data.tokenizers.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer
from util.errors import UserError

Parts = list["str | int"]  # text to encode, and ids of sentinels


def sentinels(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Returns the ids of the prefix, middle and suffix sentinels."""
    try:
        return tokenizer.special[FIM_PREFIX], tokenizer.special[FIM_MIDDLE], tokenizer.special[FIM_SUFFIX]
    except KeyError as e:
        raise UserError(
            f"--tokenizer={tokenizer.name} has no {e.args[0]}, which fill-in-the-middle needs; use gpt2-fim, or train"
            f" one with --special_tokens={FIM_PREFIX},{FIM_MIDDLE},{FIM_SUFFIX}"
        ) from e


def rearrange(text: str, rate: float, spm_rate: float, tokenizer: Tokenizer) -> Parts:
    """Rearranges a document with probability `rate` and returns its parts in order.

    `spm_rate` is the share of SPM among rearranged documents. The random numbers are a hash of the text, so the result
    depends on the text alone.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
    chosen, first, second, order = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16, 24))
    if chosen >= rate * 2**64:
        return [text]
    low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    pre, mid, suf = sentinels(tokenizer)
    if order < spm_rate * 2**64:
        return [pre, suf, suffix, mid, prefix, middle]
    return [pre, prefix, suf, suffix, mid, middle]


def infill_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the prompt after which a PSM model writes the text between `prefix` and `suffix`."""
    pre, mid, suf = sentinels(tokenizer)
    return [pre, *tokenizer.encode(prefix), suf, *tokenizer.encode(suffix), mid]
