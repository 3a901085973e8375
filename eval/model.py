"""The model under evaluation: a rawgpt checkpoint, a model that --init_from can name, or a Hugging Face folder."""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.fingerprint import check_same_tokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import Tokenizer
from eval.encoding import TextEncoder, continuation_encoder, text_encoder
from eval.scoring import Batch, Forward, ScoringModel, gpt_forward
from model.formats.checkpoint import step_of
from model.formats.pretrained import load_model
from model.gpt import GPT
from model.loss import IGNORE_INDEX, losses_of_logits
from util.errors import UserError
from util.files import read_json
from util.ranks import Ranks, init_ranks

CPU_BATCH_TOKENS = 4096  # enough to keep all cores busy
GPU_BATCH_TOKENS = 65536
HF_GPU_BATCH_TOKENS = 16384  # less, because a transformers model computes the logits of all positions
RANK_TIMEOUT_MINUTES = 24 * 60.0  # a rank may wait for a slower one for hours


@dataclass(frozen=True)
class Checkpoint:
    """The part of an `EvalModel` that only a model loaded as a `GPT` has."""

    gpt: GPT
    step: int | None  # None if the folder's name does not say
    tokenizer: Tokenizer | None
    tokenizer_fingerprint: dict[str, Any]  # as recorded in training; known even if the tokenizer is not loaded


@dataclass(frozen=True, kw_only=True)
class EvalModel(ScoringModel):
    """A model to score requests with (eval/scoring.py), and what is needed to make requests of texts."""

    name: str
    vocab_size: int
    encoder: TextEncoder | None = None  # None: only token ids can be scored
    byte_lengths: np.ndarray | None = None  # (vocab_size,), the bytes of each token's text, if known
    document_separator: int | None = None  # if the model was trained with --doc_mask: the token between documents
    checkpoint: Checkpoint | None = None  # None for a transformers model

    @property
    def label(self) -> str:
        """A short name."""
        step = self.checkpoint.step if self.checkpoint else None
        return self.name if step is None else f"step {step}"

    @property
    def text(self) -> TextEncoder:
        """The encoder. It is an error to ask for it if the model was loaded without a tokenizer."""
        if self.encoder is None:
            raise ValueError("the model was loaded without a tokenizer")
        return self.encoder


def load_eval_model(args: Namespace, needs_tokenizer: bool = True) -> EvalModel:
    """Loads the model that --checkpoint or --hf names. Under torchrun it also joins the ranks.

    Without `needs_tokenizer` a checkpoint whose tokenizer cannot be loaded is accepted, to score token ids.
    """
    ranks = init_ranks(args.device, RANK_TIMEOUT_MINUTES, cpu_collectives=True)
    on_gpu = GPU_BATCH_TOKENS if args.checkpoint else HF_GPU_BATCH_TOKENS
    batch_tokens = args.batch_tokens or (CPU_BATCH_TOKENS if ranks.device.type == "cpu" else on_gpu)
    if args.checkpoint:
        return load_checkpoint(args, ranks, batch_tokens, needs_tokenizer)
    return load_hf(args, ranks, batch_tokens)


def in_dtype(forward: Forward, device: torch.device, dtype: torch.dtype) -> Forward:
    """Returns `forward` under autocast to `dtype`, without gradients."""

    @torch.inference_mode()
    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return forward(batch)

    return run


# --- checkpoints ----------------------------------------------------------------------------------


def load_checkpoint(args: Namespace, ranks: Ranks, batch_tokens: int, needs_tokenizer: bool) -> EvalModel:
    """Loads --checkpoint as a `GPT`."""
    model, flags, path = load_model(args.checkpoint, ranks.device, print if ranks.is_main else lambda line: None)
    tokenizer = None
    try:
        tokenizer = load_model_tokenizer(args.tokenizer, path, flags)
    except UserError as error:
        if needs_tokenizer or args.tokenizer or flags["doc_mask"]:
            raise
        if ranks.is_main and flags["tokenizer"] != "none":
            print(f"no bits per byte: {error}")
    return EvalModel(
        forward=in_dtype(gpt_forward(model), ranks.device, getattr(torch, args.dtype)),
        ranks=ranks,
        n_positions=model.config.n_positions,
        batch_tokens=batch_tokens,
        name=str(path),
        vocab_size=model.config.vocab_size,
        encoder=text_encoder(tokenizer) if tokenizer else None,
        byte_lengths=tokenizer.byte_lengths(model.config.vocab_size) if tokenizer else None,
        document_separator=tokenizer.end_of_text if tokenizer and flags["doc_mask"] else None,
        checkpoint=Checkpoint(
            gpt=model,
            step=step if (step := step_of(path)) >= 0 else None,
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else saved_tokenizer(path),
        ),
    )


def load_model_tokenizer(wanted: str, path: Path, flags: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a checkpoint: `wanted` if given, else its own copy, else the one in its flags.

    It is an error if there is none, or if it differs from the tokenizer that the model was trained with.
    """
    name = wanted or str(path if (path / "tokenizer.json").is_file() else flags["tokenizer"])
    if name == "none":
        raise UserError(f"{path}: trained with --tokenizer=none; name its tokenizer with --tokenizer")
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > flags["vocab_size"]:
        raise UserError(
            f"--tokenizer={name} has {tokenizer.vocab_size:,} tokens, but {path} has only {flags['vocab_size']:,}; name"
            " the tokenizer that it was trained with"
        )
    check_same_tokenizer(saved_tokenizer(path), tokenizer.fingerprint)
    return tokenizer


def saved_tokenizer(path: Path) -> dict[str, Any]:
    """Returns the recorded fingerprint of the tokenizer that a checkpoint was trained with.

    Its name is "none" if the run had no tokenizer or if `path` is not a rawgpt checkpoint.
    """
    if not (path / "state.json").is_file():
        return {"name": "none"}
    try:
        fingerprint = read_json(path / "state.json").get("tokenizer", {"name": "none"})
    except (OSError, ValueError, AttributeError):
        fingerprint = None
    if not isinstance(fingerprint, dict):
        raise UserError(f"{path / 'state.json'} is damaged")
    return fingerprint


# --- transformers ---------------------------------------------------------------------------------


def load_hf(args: Namespace, ranks: Ranks, batch_tokens: int) -> EvalModel:
    """Loads --hf with transformers, without running code from the folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise UserError("--hf needs the package transformers; pip install 'transformers>=4.56,<6'") from e
    name = os.path.expanduser(args.hf)
    check_hf_flags(args, name)
    try:
        # trust_remote_code must be given: by default transformers asks on the terminal whether to run code.
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(args.tokenizer) or name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        model = model.to(ranks.device).eval()
    except Exception as e:  # transformers documents no exception types
        where = "" if os.path.isdir(name) else "; it is not a folder here, and not on the hub or the hub is unreachable"
        raise UserError(
            f"--hf={args.hf}: transformers cannot load it ({type(e).__name__}: {str(e)[:200]}){where}"
        ) from e
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and "bos_token" not in tokenizer.init_kwargs:  # as in read_tokenizer_json
        derived = model.generation_config._from_model_config  # from config.json
        bos = None if derived else model.generation_config.bos_token_id
    return EvalModel(
        forward=in_dtype(hf_forward(model), ranks.device, getattr(torch, args.dtype)),
        ranks=ranks,
        n_positions=hf_positions(model.config, tokenizer),
        batch_tokens=batch_tokens,
        shares_context=False,
        name=args.hf,
        vocab_size=model.get_input_embeddings().num_embeddings,
        encoder=TextEncoder(
            encode=lambda text: list(tokenizer.encode(text)),
            encode_continuation=continuation_encoder(
                lambda text: list(tokenizer.encode(text, add_special_tokens=False))
            ),
            bos_tokens=[token for token in (bos, eos) if token is not None][:1],
            end_of_text=eos,
        ),
    )


def check_hf_flags(args: Namespace, name: str) -> None:
    """Checks --hf, whose expanded path is `name`, and --tokenizer before transformers reads them."""
    if os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"--hf={args.hf}: the folder has no config.json, so it does not hold a model")
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"--hf={args.hf}: no such folder")
    if args.tokenizer and not os.path.exists(os.path.expanduser(args.tokenizer)):
        raise UserError(f"--tokenizer={args.tokenizer}: no such folder; with --hf name a Hugging Face tokenizer folder")


def hf_positions(config: Any, tokenizer: Any) -> int:
    """Returns the context length of a transformers model from its configuration; 2,048 if it does not say."""
    named = (getattr(config, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx"))
    found = next((n for n in named if n), tokenizer.model_max_length)
    return int(found) if found < 10**9 else 2048


def hf_forward(model: nn.Module) -> Forward:
    """Returns the forward pass of a transformers model.

    Rows are causal and padded on the right, so the model needs no attention mask.
    """
    trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        # Only the last positions of the batch have targets. Most models can compute the logits of these alone.
        chosen = batch.targets != IGNORE_INDEX
        first = int(chosen.any(0).float().argmax())
        kept = batch.idx.size(1) - first
        logits = model(batch.idx, use_cache=False, **({"logits_to_keep": kept} if trims else {})).logits[:, -kept:]
        # Row by row, because a float copy of all logits may not fit into memory.
        rows = zip(logits, batch.targets[:, first:], chosen[:, first:], strict=True)
        found = [losses_of_logits(z[here].float(), t[here]) for z, t, here in rows]
        losses, greedy = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(greedy)

    return forward
