"""Reader of llama2.c's tokenizer file (tokenizer.bin, tok512.bin). It converts the file to a tokenizer.json.

The file is little-endian: int32, the length of the longest piece in bytes; then for each piece a float32 score, an
int32 length and UTF-8 text. Ids 0 to 2 are <unk>, <s> and </s>, ids 3 to 258 the bytes as <0x00> to <0xFF>. The other
pieces were learned by SentencePiece; its ▁ is written as a space. llama2.c puts a space before the text and splits it
into characters, or bytes for characters without a piece. As long as two neighbours form a piece, it merges the pair
with the highest score, the leftmost if there are several. As with ranks, each piece is merged from a single pair
(data/tokenizers/bpe.py). These pairs, ordered by score and then by id, are the list of merges of the tokenizer.json.

llama2.c's data starts each story with <s> and has no </s>, and its samples stop at <s>. So <s> is the end-of-text
token.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

from data.tokenizers.bpe import merge, merges
from data.tokenizers.hf_json import read_tokenizer_json
from data.tokenizers.tokenizer import Tokenizer
from util.errors import UserError, user_errors

MAX_BYTES = 2**24  # of a file; Llama's file with 32,000 pieces has 434 kB
MAX_PIECE = 2**8  # bytes; Llama's longest piece has 27
MAX_TIED = 2**8  # pieces with a score that another piece has too; Llama has 16
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
FIRST = len(SPECIAL) + len(BYTES)  # id of the first learned piece
SPACE = "▁"  # SentencePiece's letter for a space


def load_llama2c_tokenizer(file: Path) -> Tokenizer:
    """Loads llama2.c's file. The tokenizer's `files` contain the tokenizer.json that it was converted to."""
    with user_errors(f"--tokenizer: {file}"), open(file, "rb") as f:
        content = f.read(MAX_BYTES + 1)
    try:
        data = tokenizer_json(read_pieces(content))
    except ValueError as e:
        raise UserError(f"{file}: not llama2.c's tokenizer file, or damaged: {e}") from e
    config = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    return read_tokenizer_json(str(file), file, json.dumps(data, ensure_ascii=False).encode(), config)


def read_pieces(content: bytes) -> dict[str, float]:
    """Returns the score of each piece, in the order of ids. Raises ValueError if the content is damaged."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    longest = struct.unpack_from("<i", content)[0] if len(content) >= 4 else 0
    if not 0 < longest <= MAX_PIECE:
        raise ValueError(f"it does not start with the length of its longest piece, 1 to {MAX_PIECE} bytes")
    pieces: dict[str, float] = {}
    at = 4
    while at < len(content):
        where = f"piece {len(pieces)} at byte {at:,}"
        if len(content) - at < 8:
            raise ValueError(f"{where} is cut off")
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        if not 0 < length <= longest:
            raise ValueError(f"{where} has length {length}, but the longest should have {longest}")
        if len(content) - at < length:
            raise ValueError(f"{where} is cut off")
        try:
            piece = content[at : at + length].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where} is not UTF-8") from None
        if piece in pieces or not math.isfinite(score):
            raise ValueError(f"{where}, {piece!r}, {'occurs twice' if piece in pieces else f'has score {score}'}")
        pieces[piece] = score
        at += length
    return pieces


def tokenizer_json(pieces: dict[str, float]) -> dict[str, Any]:
    """Returns the tokenizer.json that gives llama2.c's ids. Raises ValueError if the pieces do not allow it."""
    names = [*pieces]
    for i, name in enumerate(SPECIAL + BYTES):
        if i >= len(names) or names[i].strip("\n" if 0 < i < len(SPECIAL) else "") != name:
            raise ValueError(f"id {i} is {names[i]!r}, not {name}" if i < len(names) else f"it ends before {name}")
    learned = names[FIRST:]
    if " " not in learned or any(SPACE in piece for piece in learned):
        raise ValueError(f"it has no piece for the space, or one with {SPACE}")
    # Pieces of one score, such as Llama's runs of spaces, stay in the order of their ids.
    ranks = {piece: rank for rank, piece in enumerate(sorted(learned, key=lambda piece: -pieces[piece]))}
    check_ties({piece: pieces[piece] for piece in learned}, ranks)
    vocab = [*SPECIAL, *BYTES, *(piece.replace(" ", SPACE) for piece in learned)]
    if len(set(vocab)) < len(vocab):
        raise ValueError("a learned piece has the name of a special token or byte")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "normalizer": _sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, _replace(" ", SPACE)),
        "pre_tokenizer": None,
        "post_processor": _template("<s>", 1),
        "decoder": _sequence(
            "decoders",
            _replace(SPACE, " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(vocab)},
            "merges": [" ".join(part.replace(" ", SPACE) for part in pair) for pair in merges(ranks)],
        },
    }


def check_ties(scores: dict[str, float], ranks: dict[str, int]) -> None:
    """Checks that merging by rank gives the pieces of merging by score, where pieces of one score touch or overlap.

    By rank the piece with the lower id is merged first, by score the leftmost one.
    """
    count = Counter(scores.values())
    tied = [piece for piece, score in scores.items() if len(piece) > 1 and count[score] > 1]
    if len(tied) > MAX_TIED:
        raise ValueError(f"{len(tied):,} pieces share their score with another piece, and so have no order")
    costs = {piece: -score for piece, score in scores.items()}
    for one, other in product(tied, tied):
        for shared in range(len(other)):
            text = one + other[shared:]
            if one.endswith(other[:shared]) and merge(text, costs) != merge(text, ranks):
                raise ValueError(f"pieces {one!r} and {other!r} have one score, and so no order in {text!r}")


def _sequence(parts: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", parts: [*steps]}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _template(token: str, i: int) -> dict[str, Any]:
    """Returns the post-processor that puts a token before each text."""
    one = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": one, "pair": [*one, *two], "special_tokens": special}
