"""Fill-in-the-middle: a document rearranged so that a left-to-right model learns to fill a hole.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255): the document
is cut at two random characters, each part is encoded for itself, and the parts are put in the order
prefix-suffix-middle (PSM) or suffix-prefix-middle (SPM, in the form of its appendix D that shares PSM's sentinels).
"""

from __future__ import annotations

import hashlib

from data.tokenizers.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer
from util.errors import UserError

Parts = list["str | int"]  # text to encode, and sentinels' ids as they are


def sentinels(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of the prefix, middle and suffix sentinels. Raises UserError if the tokenizer has none."""
    try:
        return tokenizer.special[FIM_PREFIX], tokenizer.special[FIM_MIDDLE], tokenizer.special[FIM_SUFFIX]
    except KeyError as e:
        raise UserError(
            f"--tokenizer={tokenizer.name} has no {e.args[0]}, which fill-in-the-middle needs; use gpt2-fim, or train"
            f" one with --special_tokens={FIM_PREFIX},{FIM_MIDDLE},{FIM_SUFFIX}"
        ) from e


def rearrange(text: str, rate: float, spm_rate: float, tokenizer: Tokenizer) -> Parts:
    """The document's parts in order; the text alone with probability 1 - `rate`.

    `spm_rate` is the share of SPM among the rearranged. A pure function of the text: a hash of it draws, so
    neither the document's place nor the number of workers matters.
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
    """Ids after which a model trained on PSM writes what belongs between `prefix` and `suffix`."""
    pre, mid, suf = sentinels(tokenizer)
    return [pre, *tokenizer.encode(prefix), suf, *tokenizer.encode(suffix), mid]
