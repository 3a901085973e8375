"""`python data/sft.py FILE_OR_GLOB... --output_dir DIR`: instruction data for fine-tuning.

Reads conversations from .jsonl, .json (also compressed) and .parquet files, in the formats that
data/prepare/conversations.py lists. Writes to DIR token shards, for each shard a mask of the tokens that count
(data/masks.py), and in DIR/tokenizer the tokenizer with the special tokens of the chat template. Conversations are
packed into blocks of --sequence_length tokens. An end-of-text token begins each conversation, and more of them fill the
rest of a block. docs/finetuning.md has the training command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

import numpy as np

from data.fingerprint import same_tokenizer
from data.masks import SUFFIX
from data.prepare.conversations import FORMATS, messages_of, read_conversations
from data.prepare.inputs import file_fingerprint, input_files
from data.prepare.job import Job, disk_errors, locked, open_job, publish, read_manifest, tokenizer_recipe
from data.prepare.journal import Progress
from data.prepare.packing import pack
from data.prepare.parts import checked_files
from data.prepare.sources import describe_skipped
from data.prepare.workers import EncodeOptions, text_bytes
from data.shards import open_shard, token_dtype, write_shard
from data.tokenizers.chat import BUILT_IN, Chat, find_template, prepare_tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import Tokenizer
from util.errors import CommandParser, UserError, run_command
from util.files import file_sha256, write_atomically

TOKENIZER_FOLDER = "tokenizer"


class Conversation(NamedTuple):
    """A conversation as it is written: ids, and which of them are counted, both (n,)."""

    ids: np.ndarray
    counted: np.ndarray

    def digest(self) -> bytes:
        return hashlib.blake2b(self.ids.tobytes() + self.counted.tobytes(), digest_size=16).digest()


class Encoder:
    """Turns rows into Conversations of at most `sequence_length` tokens, and counts those that it cuts."""

    def __init__(self, chat: Chat, rows: str, sequence_length: int):
        self.chat, self.rows, self.sequence_length = chat, rows, sequence_length
        self.cut = 0
        self.skipped: Counter[str] = Counter()

    def __call__(self, row: Any) -> Conversation | None:
        """Returns None for a row that is skipped. Raises ValueError with a message that follows "line N"."""
        messages = messages_of(row, self.rows)
        if not messages:
            self.skipped["empty"] += 1
            return None
        try:
            ids, counted = self.chat.encode(messages)
        except UserError as e:  # the tokenizer cannot encode the text
            raise ValueError(f": {e}") from e
        end = self.chat.tokenizer.end_of_text
        if ids[:1] != [end]:
            ids, counted = [end, *ids], [False, *counted]
        if end in ids[1:]:
            raise ValueError(": the chat template writes the end-of-text token within this conversation")
        if not any(counted[1:]):
            raise ValueError(": the chat template writes no reply of this conversation")
        size = self.sequence_length
        if not any(counted[1:size]):
            self.skipped["too long before the first reply"] += 1
            return None
        self.cut += len(ids) > size
        dtype = token_dtype(self.chat.tokenizer.vocab_size)
        return Conversation(np.array(ids[:size], dtype), np.array([False, *counted[1:size]], np.uint8))


def encode(files: list[str], args: argparse.Namespace, encoder: Encoder) -> list[Conversation]:
    """Returns the conversations of all files, in order."""
    from tqdm import tqdm

    found = []
    for path in files:
        rows = read_conversations(path, args.format or "", encoder, args.skip_bad, encoder.skipped)
        with tqdm(rows, desc=os.path.basename(path), unit=" rows", disable=None, mininterval=0.5) as bar:
            found += [row for row in bar if row is not None]
    if not found:
        raise UserError(f"the input contains no conversations{describe_skipped(encoder.skipped)}")
    return found


def split(found: list[Conversation], val_share: float) -> tuple[list[Conversation], list[Conversation]]:
    """Divides conversations into training and validation, by their hashes: equal ones are on one side."""
    digests = [conversation.digest() for conversation in found]
    val_count = max(1, round(val_share * len(found))) if val_share else 0
    last = sorted(digests)[val_count - 1] if val_count else b""
    sides = [[c for c, d in zip(found, digests, strict=True) if (d <= last) is val] for val in (False, True)]
    if not sides[0]:
        raise UserError(
            f"--val_share={val_share} leaves no conversation for training; use --val_share=0, or give more data"
        )
    return sides[0], sides[1]


def blocks_of(conversations: list[Conversation], size: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs conversations into blocks. Returns ids and whether each is counted, both (blocks, size)."""
    blocks = pack([len(conversation.ids) for conversation in conversations], size)
    ids = np.full((len(blocks), size), filler, conversations[0].ids.dtype if conversations else np.uint16)
    counted = np.zeros((len(blocks), size), np.uint8)
    for block, members in enumerate(blocks):
        at = 0
        for conversation in (conversations[i] for i in members):
            end = at + len(conversation.ids)
            ids[block, at:end], counted[block, at:end] = conversation
            at = end
    return ids, counted


def shards_of(
    name: str, first: int, ids: np.ndarray, counted: np.ndarray, size: int, end: int
) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, tokens and mask of shards of at most `size` blocks. The last has one more token, `end`."""
    for i, start in enumerate(range(0, len(ids), size), first):
        tokens, mask = ids[start : start + size].reshape(-1), counted[start : start + size].reshape(-1)
        if start + size >= len(ids):
            tokens, mask = np.append(tokens, np.array(end, tokens.dtype)), np.append(mask, np.uint8(0))
        yield f"{name}_{i:06d}", tokens, mask


def make_shards(
    found: list[Conversation], args: argparse.Namespace, name: str, end: int
) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """Returns name, tokens and mask of each shard, and what the manifest says about them."""
    size = args.sequence_length
    train, val = split(found, args.val_share)
    ids, counted = blocks_of(train, size, end)
    val_ids, val_counted = blocks_of(val, size, end)
    shards = list(shards_of(f"{name}_val", 0, val_ids, val_counted, len(val_ids) or 1, end))
    shards += shards_of(f"{name}_train", 1, ids, counted, args.shard_size // size, end)
    total = sum(len(conversation.ids) for conversation in found)
    return shards, {
        "sequence_length": size,
        "conversations": {"train": len(train), "val": len(val)},
        "blocks": {"train": len(ids), "val": len(val_ids)},
        "packed_share": round(total / (size * (len(ids) + len(val_ids))), 4),
        "counted_tokens": {"train": int(counted.sum()), "val": int(val_counted.sum())},
    }


def write(
    folder: Path, shards: list[tuple[str, Any, Any]], tokenizer: Tokenizer, tokenizer_files: dict[str, bytes]
) -> list[dict[str, Any]]:
    """Writes everything but the manifest. Returns the manifest's rows; the shards, which globs find, are last."""
    rows = []
    files = {f"{TOKENIZER_FOLDER}/{name}": content for name, content in tokenizer_files.items()}
    files |= {f"{name}{SUFFIX}": mask.tobytes() for name, _, mask in shards}
    for name, content in files.items():
        write_atomically(folder / name, content)
        rows.append({"name": name, "bytes": len(content), "sha256": file_sha256(folder / name)})
    for name, tokens, _ in shards:
        path = folder / f"{name}.bin"
        write_shard(path, tokens, tokenizer.vocab_size)
        row = {"name": path.name, "tokens": len(tokens), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        rows.append(row)
    return rows


def prepare(args: argparse.Namespace, name: str) -> None:
    """Makes the data set, and prints a summary."""
    base = load_tokenizer(args.tokenizer)
    template = find_template(args.chat_template or "", base)
    files = input_files(args.inputs, args.format or "")
    keys = ("sequence_length", "val_share", "shard_size", "skip_bad", "rows", "format")
    recipe = {
        "source": [file_fingerprint(path) for path in files],
        **tokenizer_recipe(base),
        "chat_template": template.fingerprint["sha256"],
        "name": name,
        **{key: getattr(args, key) for key in keys},
    }
    partial = open_job(args.output_dir, recipe)
    if partial is None:
        print(f"{args.output_dir}: already there")
        return
    tokenizer, tokenizer_files = prepare_tokenizer(base, template, args.output_dir / TOKENIZER_FOLDER)
    job = Job(args.output_dir, name, recipe, tokenizer, EncodeOptions())
    with disk_errors(args.output_dir), locked(args.output_dir):
        encoder = Encoder(Chat(tokenizer, find_template("tokenizer", tokenizer)), args.rows or "", args.sequence_length)
        found = encode(files, args, encoder)
        shards, facts = make_shards(found, args, name, tokenizer.end_of_text)
        rows = write(partial, shards, tokenizer, tokenizer_files)
        tokens = sum(len(tokens) for _, tokens, _ in shards)
        size = sum(text_bytes(tokens, tokenizer) for _, tokens, _ in shards)
        progress = Progress(1, tokens, len(found), size, encoder.skipped)
        facts = {"chat_template": template.fingerprint, "cut": encoder.cut, **facts}
        manifest = publish(job, partial, progress, rows, facts)
    print(summary(args.output_dir, manifest))


def summary(output_dir: Path, manifest: dict[str, Any]) -> str:
    """Describes a data set in two lines, and gives a command to train on it."""
    conversations, counted, blocks = (manifest[key] for key in ("conversations", "counted_tokens", "blocks"))
    cut = f", {manifest['cut']:,} cut" if manifest["cut"] else ""
    return (
        f"{output_dir}: {conversations['train']:,} conversations for training and {conversations['val']:,} for"
        f" validation{cut}{describe_skipped(manifest['skipped'])}\n"
        f"{blocks['train']:,} and {blocks['val']:,} blocks of {manifest['sequence_length']:,} tokens,"
        f" {manifest['packed_share']:.1%} full; {counted['train']:,} and {counted['val']:,} tokens are counted\n"
        f"to train: {training_command(output_dir, manifest)}"
    )


def training_command(output_dir: Path, manifest: dict[str, Any]) -> str:
    """Returns a command for training, without the model."""
    name = manifest["recipe"]["name"]
    flags = ["--cfg=sft", "--init_from=MODEL", f"--input_train_bin={output_dir}/{name}_train_*.bin"]
    if manifest["blocks"]["val"]:
        flags.append(f"--input_val_bin={output_dir}/{name}_val_*.bin")
    flags += [f"--tokenizer={output_dir / TOKENIZER_FOLDER}", f"--sequence_length={manifest['sequence_length']}"]
    if manifest["tokenizer"].get("sha256") != manifest["recipe"]["tokenizer"]:
        flags.append("--resize_embeddings=1")  # for the new special tokens
    return shlex.join(["python", "train_gpt.py", *flags])


def check(output_dir: Path) -> None:
    """Verifies shards and masks of a folder, and prints the summary."""
    manifest = read_manifest(output_dir)
    if manifest is None or "counted_tokens" not in manifest:
        raise UserError(f"--output_dir={output_dir}: no data set that data/sft.py has made; give its folder")
    paths = checked_files(output_dir, manifest)
    tokenizer = load_tokenizer(str(output_dir / TOKENIZER_FOLDER))
    if not same_tokenizer(manifest["tokenizer"], tokenizer.fingerprint):
        raise UserError(f"{output_dir / TOKENIZER_FOLDER} is not the tokenizer of these shards; make them again")
    counted = Counter[str]()
    for path in paths:
        if path.suffix != ".bin":
            continue
        ids = open_shard(path, tokenizer.vocab_size, check_all=True)
        mask = np.fromfile(path.with_suffix(SUFFIX), np.uint8)
        begins = slice(0, None, manifest["sequence_length"])
        tokens = ids.read(0, ids.count)
        fits = len(mask) == len(tokens) and mask.max() <= 1
        if not fits or mask[begins].any() or (tokens[begins] != tokenizer.end_of_text).any():
            raise UserError(f"{path} and its mask do not belong together; make them again")
        counted["val" if "_val_" in path.name else "train"] += int(mask.sum())
    if {**{"train": 0, "val": 0}, **counted} != manifest["counted_tokens"]:
        raise UserError(f"{output_dir}: the masks count other tokens than the manifest says; make them again")
    print(f"{summary(output_dir, manifest)}\nhashes, ids and masks are as in the manifest")


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("inputs", nargs="*", metavar="FILE_OR_GLOB")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--name", default="", help="first part of the shards' names (default: the folder's name)")
    parser.add_argument("--tokenizer", default="gpt2", help="name, folder or path of a tokenizer.json (default: gpt2)")
    parser.add_argument(
        "--chat_template",
        metavar="TEMPLATE",
        help=f"{', '.join(BUILT_IN)}, tokenizer (its own), or a file (default: the tokenizer's own, or else chatml)",
    )
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens in a block (default: 1024)")
    parser.add_argument("--val_share", type=float, default=0.05, help="share for validation (default: 0.05)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens in a shard (default: 100,000,000)")
    parser.add_argument("--rows", choices=list(FORMATS), help="format of the rows (default: by the fields of each row)")
    parser.add_argument("--format", choices=["jsonl", "parquet"], help="kind of all files, whatever their names say")
    parser.add_argument("--skip_bad", action="store_true", help="skip malformed rows, and count them")
    parser.add_argument("--check", action="store_true", help="verify the data set in --output_dir")
    args = parser.parse_args()
    if args.check:
        return check(args.output_dir)
    if not args.inputs:
        raise UserError("give the files of conversations")
    if args.sequence_length < 8:
        raise UserError(f"--sequence_length={args.sequence_length} must be at least 8")
    if not 0 <= args.val_share < 1:
        raise UserError(f"--val_share={args.val_share} must be at least 0 and less than 1")
    if not args.sequence_length <= args.shard_size < 2**31:
        raise UserError(f"--shard_size={args.shard_size} must be from --sequence_length to 2,147,483,647")
    name = args.name or args.output_dir.resolve().name
    if Path(name).name != name or "_val_" in name or "_train_" in name:
        raise UserError(f"--name={name} must be a name, not a path, and must not contain _val_ or _train_")
    prepare(args, name)


if __name__ == "__main__":
    run_command(main)
