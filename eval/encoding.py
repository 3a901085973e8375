"""Encoding of texts and of their continuations, for models under evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data.tokenizers.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TextEncoder:
    """The part of a tokenizer that evaluation uses. The tokenizer is rawgpt's or one of transformers."""

    encode: Encode  # a text from its start, including any tokens that the tokenizer itself puts there
    encode_continuation: Encode  # a text that continues another one; it starts with a space or a newline
    bos_tokens: list[int]  # the context of a text that has none: BOS, else end-of-text; [] if there is neither
    end_of_text: int


def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    """Returns the encoder of a rawgpt tokenizer."""
    return TextEncoder(
        encode=tokenizer.encode_whole,
        encode_continuation=continuation_encoder(tokenizer.encode),
        bos_tokens=tokenizer.bos_tokens[:1],
        end_of_text=tokenizer.end_of_text,
    )


def encode_prompt(
    tokenizer: Tokenizer, text: str, bos: bool | None = None, special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Returns the ids that stand before a prompt, and the ids of its text.

    Before it stands what the tokenizer itself puts before a text: nothing for GPT-2, <s> for Llama. With `bos` it is
    the token that documents start with, without it (False) nothing. An empty prompt always starts a document. With
    `special_tokens` the name of a special token in the text stands for the token.
    """
    ids = tokenizer.encode_prompt(text) if special_tokens else tokenizer.encode(text)
    if bos or not text:
        return tokenizer.bos_tokens, ids
    return tokenizer.prefix if bos is None else [], ids


def continuation_encoder(encode: Encode) -> Encode:
    """Returns a function that encodes continuations.

    SentencePiece inserts a space before every text. A continuation must not get one, so it is encoded after an "x",
    whose tokens are then removed.
    """
    prefix = encode("x")
    return lambda text: encode("x" + text)[len(prefix) :]


def encode_pair(context: str, continuation: str, encode: Encode) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of its continuation.

    Both are encoded together and split at the length of the encoded context. Spaces at the end of the context move to
    the continuation, because most tokenizers attach a space to the word after it (as in lm-evaluation-harness).
    """
    stripped = context.rstrip()
    both, context_ids = encode(context + continuation), encode(stripped)
    return context_ids, both[len(context_ids) :]
