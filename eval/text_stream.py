"""The text of a row as its tokens come: whole characters, up to the end of the document or a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data.tokenizers.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text that is certain, and holds back what is not yet.

    That is the bytes of an unfinished character, and text that may turn out to be the start of a stop string. The
    text ends before the stop string that is complete first, of several at once before the longest, and before the
    token `end`; None: at no token. All pieces together are what `Tokenizer.decode` gives for all tokens, cut there.
    With `at_start` the space goes that SentencePiece's encoders put before a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], end: int | None, at_start: bool):
        if "" in stop:
            raise ValueError("an empty stop string is found everywhere")
        self.ended = False
        self._ordinary = tokenizer.token_bytes
        self._special = {i: name.encode() for name, i in tokenizer.special.items()}
        self._stop, self._end = stop, end
        self._starts = [text[:n] for text in stop for n in range(1, len(text))]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._space = at_start and tokenizer.library is not None and tokenizer.library.prepends_space

    def add(self, token: int) -> str:
        """The text that has become certain; from the end on there is none."""
        if self.ended:
            return ""
        if token == self._end:
            return self.finish()
        content = self._special.get(token, self._ordinary.get(token))
        if content is None:  # an id that the tokenizer does not have
            return self._certain(self._decoder.decode(b"", final=True) + "�")
        return self._certain(self._decoder.decode(content))

    def finish(self) -> str:
        """The rest: no token follows."""
        if self.ended:
            return ""
        text = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self.ended, self._held = True, ""
        return text

    def _certain(self, new: str) -> str:
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
