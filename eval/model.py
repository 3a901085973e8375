"""What is evaluated: a checkpoint of ours, or any causal language model in a Hugging Face folder."""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.tokenizers.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from eval.cli import my_rank
from eval.scoring import Batch, Forward, Request, Score, follow_on, gpt_forward, merge, score
from model.formats.checkpoint import step_of
from model.formats.pretrained import load_model
from model.gpt import GPT
from model.loss import IGNORE_INDEX, losses_of_logits
from util.device import choose_device
from util.errors import UserError
from util.files import read_json

T = TypeVar("T")
BATCH_TOKENS = {"cpu": 4096}  # enough to keep its cores busy
GPU_BATCH_TOKENS = 65536
HF_GPU_BATCH_TOKENS = 16384  # a model of transformers makes logits of them all


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be asked how likely texts are."""

    name: str
    step: int | None  # of the checkpoint; None where its folder has another name
    forward: Forward
    encode: Callable[[str], list[int]]  # a text from its beginning on, with what the tokenizer puts there
    encode_more: Callable[[str], list[int]]  # a text that follows on another; begins with a space or a newline
    before_text: int  # the token that a text begins with, and
    end_of_text: int  # that documents are separated by; -1 both where there is no tokenizer
    vocab_size: int  # ids are below this
    limit: int  # positions that the model sees at once
    shared: bool  # whether `forward` takes masks, so that endings can share their context
    device: torch.device
    batch_tokens: int
    byte_lengths: np.ndarray | None  # (vocab_size,) of each token's text; None where that is not known
    gpt: GPT | None = None
    tokenizer: Tokenizer | None = None
    tokenizer_identity: dict[str, Any] | None = None  # of what made a checkpoint's ids, also where it is not loaded
    flags: dict[str, Any] | None = None  # that a checkpoint was trained with

    @property
    def label(self) -> str:
        """A short name."""
        return self.name if self.step is None else f"step {self.step}"

    def score(self, requests: list[Request], what: str, seen: Callable[[int], Any] | None = None) -> list[list[Score]]:
        """Scores of all requests on every rank, each of which does its share.

        Shows progress called `what`, unless `seen` is to be told of the rows that each step has done.
        """
        from tqdm import tqdm

        rank, world_size = my_rank()
        work = score(self.forward, requests, self.limit, self.batch_tokens, self.device, self.shared, rank, world_size)
        rows = len(requests) * (1 if self.shared else len(requests[0].endings))
        with tqdm(total=rows, desc=what, unit="", disable=True if rank or seen else None) as bar:
            pieces = drain(work, seen or bar.update)
        return merge((piece for share in gather(pieces) for piece in share), requests)


def drain(work: Generator[int, None, T], seen: Callable[[int], Any]) -> T:
    """Runs a generator to its end, telling `seen` what it yields, and returns its value."""
    while True:
        try:
            seen(next(work))
        except StopIteration as end:
            return end.value


def join_ranks() -> None:
    """Under torchrun: the group in which results are put together. A rank may then wait for hours for a slower one."""
    if my_rank()[1] > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))


def gather(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    if my_rank()[1] == 1:
        return [value]
    values: list[Any] = [None] * my_rank()[1]
    dist.all_gather_object(values, value)
    return values


def open_subject(args: Namespace, text: bool = True) -> Subject:
    """What --checkpoint or --hf names. Raises UserError if it cannot be loaded.

    Without `text` only ids will be scored, and a checkpoint may do without its tokenizer, as training may.
    """
    device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if my_rank()[1] > 1 else 0)
    on_gpu = GPU_BATCH_TOKENS if args.checkpoint else HF_GPU_BATCH_TOKENS
    batch_tokens = args.batch_tokens or BATCH_TOKENS.get(device.type, on_gpu)
    dtype = getattr(torch, args.dtype)
    how = (args, device, batch_tokens, dtype)
    opened = open_checkpoint(*how, text) if args.checkpoint else open_hf(*how)
    join_ranks()
    return opened


def in_dtype(forward: Forward, device: torch.device, dtype: torch.dtype) -> Forward:
    """`forward` under autocast, without gradients."""

    @torch.inference_mode()
    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return forward(batch)

    return run


def saved_tokenizer(found: Path) -> dict[str, Any]:
    """The identity of the tokenizer that a checkpoint's model was trained with; its name is none if it did not know."""
    if not (found / "state.json").is_file():  # not ours
        return {"name": "none"}
    try:
        identity = read_json(found / "state.json").get("tokenizer", {"name": "none"})
    except (OSError, ValueError, AttributeError):
        identity = None
    if not isinstance(identity, dict):
        raise UserError(f"{found / 'state.json'} is damaged")
    return identity


def tokenizer_of(wanted: str, found: Path, flags: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint: the `wanted` one, else its own copy, else what the run was given.

    Raises UserError if there is none, or it is another than the model was trained with.
    """
    name = wanted or str(found if (found / "tokenizer.json").is_file() else flags["tokenizer"])
    if name == "none":
        raise UserError(f"{found}: trained with --tokenizer=none; name its tokenizer with --tokenizer")
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > flags["vocab_size"]:
        raise UserError(
            f"--tokenizer={name} has {tokenizer.vocab_size:,} tokens, {found} but {flags['vocab_size']:,}; name the one"
            f" that it was trained with"
        )
    check_same_tokenizer(saved_tokenizer(found), tokenizer.identity)
    return tokenizer


def silent(_: str) -> None:
    """What other ranks than the first say."""


def no_text(text: str) -> list[int]:
    raise ValueError("this subject was opened without a tokenizer")


def open_checkpoint(
    args: Namespace, device: torch.device, batch_tokens: int, dtype: torch.dtype, text: bool
) -> Subject:
    model, flags, found = load_model(args.checkpoint, device, print if my_rank()[0] == 0 else silent)
    tokenizer = None
    try:
        tokenizer = tokenizer_of(args.tokenizer, found, flags)
    except UserError as error:
        if text or args.tokenizer or flags["doc_mask"]:
            raise
        if my_rank()[0] == 0 and flags["tokenizer"] != "none":
            print(f"no bits per byte: {error}")
    return Subject(
        name=str(found),
        step=step if (step := step_of(found)) >= 0 else None,
        forward=in_dtype(gpt_forward(model), device, dtype),
        encode=tokenizer.encode_whole if tokenizer else no_text,
        encode_more=follow_on(tokenizer.encode) if tokenizer else no_text,
        before_text=tokenizer.before_text[0] if tokenizer else -1,
        end_of_text=tokenizer.end_of_text if tokenizer else -1,
        vocab_size=model.config.vocab_size,
        limit=model.config.n_positions,
        shared=True,
        device=device,
        batch_tokens=batch_tokens,
        byte_lengths=tokenizer.byte_lengths(model.config.vocab_size) if tokenizer else None,
        gpt=model,
        tokenizer=tokenizer,
        tokenizer_identity=tokenizer.identity if tokenizer else saved_tokenizer(found),
        flags=flags,
    )


def open_hf(args: Namespace, device: torch.device, batch_tokens: int, dtype: torch.dtype) -> Subject:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise UserError("--hf needs the package transformers; pip install 'transformers>=4.56,<6'") from e
    name = os.path.expanduser(args.hf)
    here = os.path.isdir(name)
    if not here and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"--hf={args.hf}: no such folder")
    if here and not (Path(name) / "config.json").is_file():
        raise UserError(f"--hf={args.hf}: no config.json in it, so not a model's folder")
    if args.tokenizer and not os.path.exists(os.path.expanduser(args.tokenizer)):
        raise UserError(f"--tokenizer={args.tokenizer}: no such folder; --hf takes that of a Hugging Face tokenizer")
    try:
        # No code of the folder's: unless told so, transformers asks whether to run it.
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(args.tokenizer) or name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        model = model.to(device).eval()
    except Exception as e:  # its loaders raise whatever they please
        where = "" if here else "; there is no such folder, and the hub does not have it or cannot be reached"
        raise UserError(
            f"--hf={args.hf}: transformers cannot load it ({type(e).__name__}: {str(e)[:200]}){where}"
        ) from e
    plain = lambda text: list(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    return Subject(
        name=args.hf,
        step=None,
        forward=in_dtype(hf_forward(model), device, dtype),
        encode=lambda text: list(tokenizer.encode(text)),
        encode_more=follow_on(plain),
        before_text=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        end_of_text=tokenizer.eos_token_id,
        vocab_size=model.get_input_embeddings().num_embeddings,
        limit=positions_of(model.config, tokenizer),
        shared=False,
        device=device,
        batch_tokens=batch_tokens,
        byte_lengths=None,
    )


def positions_of(config: Any, tokenizer: Any) -> int:
    """How many tokens a Hugging Face model takes at once, as its configuration calls it; 2,048 if it does not say."""
    named = (getattr(config, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx"))
    found = next((n for n in named if n), tokenizer.model_max_length)
    return int(found) if found < 10**9 else 2048


def hf_forward(model: nn.Module) -> Forward:
    """Rows are causal and padded on the right, so any causal model scores them without being told of the padding."""
    trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        chosen = batch.targets != IGNORE_INDEX
        first = int(chosen.any(0).float().argmax())
        kept = batch.idx.size(1) - first  # the logits of these last positions are all that is looked at
        logits = model(batch.idx, use_cache=False, **({"logits_to_keep": kept} if trims else {})).logits[:, -kept:]
        # Row by row, so that there is no second copy of them all.
        rows = zip(logits, batch.targets[:, first:], chosen[:, first:], strict=True)
        found = [losses_of_logits(z[here].float(), t[here]) for z, t, here in rows]
        losses, likeliest = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(likeliest)

    return forward
