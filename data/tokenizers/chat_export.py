"""Settings of an exported chat model: the tokens that end its replies, and the token that begins a conversation."""

from __future__ import annotations

import json

from data.tokenizers.chat import Chat, find_template, own_template
from data.tokenizers.hf_json import TOKENIZER_CONFIG
from data.tokenizers.tokenizer import Tokenizer
from util.errors import UserError


def open_chat(tokenizer: Tokenizer) -> Chat | None:
    """Returns a tokenizer with its own chat template, or None if it has none. One that fails is reported."""
    if not own_template(tokenizer):
        return None
    try:
        chat = Chat(tokenizer, find_template("tokenizer", tokenizer))
        chat.end_of_reply()
        return chat
    except UserError as e:
        print(f"the chat template is exported as it is, and may not fit the model: {e}")
        return None


def ends_of_text(tokenizer: Tokenizer, chat: Chat | None) -> int | list[int]:
    """Returns eos_token_id: the id of the end-of-text token, or a list with the token that ends a turn too.

    data/sft.py separates conversations with the end-of-text token. The model learns to write the token that the chat
    template puts after a reply.
    """
    end = chat.end_of_reply()[1] if chat else None
    return tokenizer.end_of_text if end in (None, tokenizer.end_of_text) else [tokenizer.end_of_text, end]


def with_end_of_text_first(files: dict[str, bytes], chat: Chat) -> dict[str, bytes]:
    """Returns a tokenizer's files with a chat template that writes the end-of-text token before each conversation.

    It is for models that were trained with --doc_mask=1, which have seen the token there. If the template writes the
    token already, the files stay as they are.
    """
    special = chat.tokenizer.special
    name = next(name for name, i in special.items() if i == chat.tokenizer.end_of_text)
    if chat.begins_with(name):
        return files
    config = json.loads(files[TOKENIZER_CONFIG])
    # Jinja removes the newline after a comment. The rest of the template then begins at the start of a line.
    config["chat_template"] = f"{{{{ {json.dumps(name)} }}}}{{# as in training #}}\n{config['chat_template']}"
    return {**files, TOKENIZER_CONFIG: (json.dumps(config, indent=1) + "\n").encode()}
