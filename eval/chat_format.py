"""The format of a model's conversations: the ids that the model continues, and where a reply ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizers.chat import RESERVED, Chat, Message, find_template, own_template
from data.tokenizers.tokenizer import Tokenizer
from eval.text_stream import TextStream
from util.errors import UserError


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with its tokenizer, and the ends of replies."""

    chat: Chat
    before: list[int]  # ids before each conversation
    ends: list[int]  # a reply ends before one of these tokens,
    stop: list[str]  # or before one of these strings
    trailing: str  # text that the template writes between a reply and the token that ends it

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model writes the next reply.

        Raises ValueError with a message that follows the place of the conversation, such as "line 3".
        """
        try:
            ids = self.chat.encode_prompt(messages)
        except UserError as e:  # the tokenizer cannot encode the text
            raise ValueError(f": {e}") from e
        if not ids:
            raise ValueError(": the chat template writes nothing")
        return ids if ids[: len(self.before)] == self.before else [*self.before, *ids]

    def stream(self, ids: Sequence[int], stop: Sequence[str] = (), endless: bool = False) -> TextStream:
        """Returns the decoder of a reply to a conversation with these ids. An `endless` one ends at `stop` only."""
        # SentencePiece's leading space is dropped only after a special token.
        at_start = ids[-1] in self.chat.tokenizer.special.values()
        if endless:
            return TextStream(self.chat.after_special, stop, [], at_start)
        return TextStream(self.chat.after_special, [*stop, *self.stop], self.ends, at_start)

    def message(self, reply: str) -> Message:
        """Returns the assistant's message with the text of a reply."""
        return {"role": "assistant", "content": RESERVED.sub("�", reply.removesuffix(self.trailing))}


def open_chat_format(
    choice: str, bos: int | None, tokenizer: Tokenizer, flags: dict[str, Any], model: Path
) -> ChatFormat:
    """Returns the format for the value of --chat_template and a model with these flags.

    data/sft.py puts the end-of-text token before each conversation, and a run that has trained with --doc_mask=1 has
    seen the token there. So it is put there too, unless `bos` decides. Prints a warning on stderr if the tokenizer
    lacks special tokens of the template.
    """
    if not choice and not own_template(tokenizer):
        raise UserError(
            f"{model}: its tokenizer has no chat template, as is usual for base models; give --chat_template=chatml or"
            " another, or continue texts with eval/generate.py without --chat"
        )
    chat = Chat(tokenizer, find_template(choice, tokenizer))
    if unknown := chat.unknown_names():
        print(
            f"--chat_template={chat.template.name}: the tokenizer lacks {', '.join(unknown)};"
            " the model sees their names as text",
            file=sys.stderr,
        )
    text, end = chat.end_of_reply()
    with_bos = flags.get("doc_mask") if bos is None else bos
    return ChatFormat(
        chat=chat,
        before=[tokenizer.end_of_text] if with_bos else [],
        ends=[tokenizer.end_of_text] if end is None else sorted({end, tokenizer.end_of_text}),
        stop=[text] if end is None and text else [],
        trailing="" if end is None else text,
    )
