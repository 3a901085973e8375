"""A conversation with a model: its messages, the part of them that fits into the context, and the next reply."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data.tokenizers.chat import Message
from eval.chat_format import ChatFormat
from eval.generate import Sampling, draw, forward, row_generator
from model.gpt import GPT
from model.kv_cache import KVCache

CACHE_TOKENS = 256  # the first size of the cache, which grows


class CachedText:
    """A text whose keys and values are kept, so that a text with an equal beginning costs only its other tokens."""

    def __init__(self, model: GPT):
        self.model = model
        self.ids: list[int] = []  # their keys and values are in the cache
        self.cache = KVCache(0)

    def logits(self, ids: list[int]) -> Tensor:
        """Returns the logits (1, vocab_size) after a text of at most `n_positions` ids, fp32 on the CPU.

        An exception, also KeyboardInterrupt, leaves the object usable.
        """
        kept = common_length(self.ids, ids[:-1])  # the last token is always evaluated, for its logits
        self.ids = ids[:kept]
        self.cache.truncate(kept)
        if len(ids) > self.cache.length:
            self.cache.reserve(min(max(len(ids), 2 * self.cache.length, CACHE_TOKENS), self.model.config.n_positions))
        new = torch.tensor([ids[kept:]])
        logits = forward(self.model, new, self.cache, None, torch.tensor([new.size(1) - 1]))
        self.ids = list(ids)
        return logits


def common_length(a: list[int], b: list[int]) -> int:
    """Returns the length of the longest common beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


class Conversation:
    """Messages that alternate between user and assistant after an optional system message.

    All messages are kept, but the model sees only the system message and the newest turns that fit into its context.
    """

    def __init__(
        self, model: GPT, chat_format: ChatFormat, system: str, max_new_tokens: int, sampling: Sampling, seed: int
    ):
        self.chat_format, self.sampling, self.seed = chat_format, sampling, seed
        self.limit = model.config.n_positions
        self.max_new_tokens = max_new_tokens
        self.room = max(1, min(max_new_tokens, self.limit // 4))  # tokens that are kept free for a reply
        self.text = CachedText(model)
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.dropped = 0  # the first messages of `turns`, which the model no longer sees

    @property
    def messages(self) -> list[Message]:
        return [*self.system, *self.turns]

    def reset(self) -> None:
        """Forgets all messages but the system message."""
        self.turns, self.dropped = [], 0

    def ask(self, question: str) -> list[int]:
        """Returns the ids after which the model replies to a question.

        Drops the oldest turns until the rest fits. Raises ValueError if the question alone does not fit, or if it
        cannot be encoded; this changes nothing. The error's message follows "the message".
        """
        try:
            question.encode()
        except UnicodeEncodeError as e:
            raise ValueError(": not UTF-8; convert it first") from e
        asked: Message = {"role": "user", "content": question}
        for dropped in range(self.dropped, len(self.turns) + 1, 2):
            ids = self.chat_format.encode([*self.system, *self.turns[dropped:], asked])
            if len(ids) + self.room <= self.limit:
                self.dropped = dropped
                return ids
        with_system = " with the system message" if self.system else ""
        raise ValueError(
            f": {len(ids):,} tokens{with_system}, but the model's context of {self.limit:,} has space for"
            f" {self.limit - self.room:,} and a reply; shorten it"
        )

    def reply(self, ids: list[int]) -> Iterator[int]:
        """Yields the tokens of a reply, until --max_new_tokens or the context is exhausted.

        A reply depends on the ids, the seed and the number of turns before it.
        """
        generator = row_generator(self.seed, len(self.turns) // 2, 0)
        text = list(ids)
        for _ in range(self.space(ids)):
            [token] = draw(self.text.logits(text), self.sampling, [generator])
            yield token
            text.append(token)

    def space(self, ids: list[int]) -> int:
        """Returns the maximum number of tokens of a reply."""
        return min(self.max_new_tokens, self.limit - len(ids))

    def end_reason(self, ids: list[int]) -> str:
        """Returns the reason why a reply has no space for more tokens."""
        full = self.space(ids) < self.max_new_tokens
        return f"the context of {self.limit:,} tokens is full" if full else "the reply reached --max_new_tokens"

    def add(self, question: str, reply: str) -> None:
        """Adds a turn."""
        self.turns += [{"role": "user", "content": question}, self.chat_format.message(reply)]
