"""Incremental decoding: the text of a row while its tokens are generated, up to end-of-text or a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from data.tokenizers.tokenizer import Tokenizer


class TextStream:
    """A decoder that returns text as soon as it is final.

    It holds back the bytes of an incomplete character, and text that may be the start of a stop string. The text ends
    before the first of the tokens `ends`, or before the stop string that is completed first. If several are completed
    by one token, it ends before the longest. All pieces joined equal `Tokenizer.decode` of all tokens, cut at that
    point. `at_start` removes the space that SentencePiece inserts before a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], ends: Collection[int], at_start: bool):
        if "" in stop:
            raise ValueError("an empty stop string matches everywhere")
        self.ended = False
        self._ordinary = tokenizer.token_bytes
        self._special = {i: name.encode() for name, i in tokenizer.special.items()}
        self._stop, self._ends = stop, ends
        self._starts = [text[:n] for text in stop for n in range(1, len(text))]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._space = at_start and tokenizer.library is not None and tokenizer.library.prepends_space

    def add(self, token: int) -> str:
        """Adds a token. Returns the text that is final now, "" after the end."""
        if self.ended:
            return ""
        if token in self._ends:
            return self.finish()
        content = self._special.get(token, self._ordinary.get(token))
        if content is None:  # not an id of the tokenizer
            return self._release(self._decoder.decode(b"", final=True) + "�")
        return self._release(self._decoder.decode(content))

    def finish(self) -> str:
        """Returns the rest of the text. No more tokens follow."""
        if self.ended:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self.ended, self._held = True, ""
        return text

    def _release(self, new: str) -> str:
        """Returns the held and the new text up to the first possible stop string, and holds the rest."""
        if self._space and new:
            new, self._space = new.removeprefix(" "), False
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.ended, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((len(start) for start in self._starts if text.endswith(start)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
