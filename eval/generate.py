"""Text generation: `python eval/generate.py --checkpoint RUN_OR_CHECKPOINT --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from eval.prompts import questions, read_prompt_file, utf8
from util.command import parse_first
from util.errors import CommandParser, UserError, run_command

HOLE = "<FILL_ME>"
TOP_P_CANDIDATES = 1024  # the number of most likely tokens that top_p looks at first


# --- flags ----------------------------------------------------------------------------------------


def parser() -> CommandParser:
    """Returns the parser of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an output_dir, one checkpoint in it, or hf:FOLDER_OR_NAME, ...")
    add("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the model's own)")
    add(
        "--prompt",
        dest="prompts",
        action="append",
        type=utf8("--prompt"),
        metavar="TEXT",
        help="text to continue; empty: start a new document",
    )
    add(
        "--prompt_file",
        dest="prompts",
        action="append",
        type=read_prompt_file,
        metavar="FILE",
        help="a file that contains one prompt; - is stdin. Repeat both flags for a batch of prompts",
    )
    add(
        "--chat",
        action="store_true",
        help="each prompt is a question; generate the reply. Each line of a .jsonl prompt file is a conversation",
    )
    cli.add_template_flag(parser, "with --chat: ")
    add("--system", default="", type=utf8("--system"), metavar="TEXT", help="with --chat: a system message")
    add("--infill", action="store_true", help=f"fill in the {HOLE} in each prompt (models trained with --fim_rate)")
    add(
        "--bos",
        type=int,
        choices=[0, 1],
        help="1: put the token that documents start with before each prompt; 0: no token (default: the tokens that the"
        " tokenizer adds; GPT-2's adds none; with --chat: those of training)",
    )
    add(
        "--special_tokens",
        type=int,
        choices=[0, 1],
        help="1: <|endoftext|> and other special tokens in a prompt are tokens; 0: they are text (default: 1)",
    )
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    cli.add_sampling_flags(parser, max_new_tokens=100)
    add("--ignore_eot", action="store_true", help="continue after the end-of-text token")
    return parser


def read_flags() -> argparse.Namespace:
    """Parses and checks the command line, and reads the prompt files."""
    args = parser().parse_args()
    cli.check_sampling(args, "eval/generate.py")
    if args.chat:
        check_chat(args)
    elif args.chat_template or args.system:
        raise UserError("--chat_template and --system are for conversations; add --chat")
    args.prompts = args.prompts or [""]
    if args.infill and args.bos is not None:
        raise UserError(f"--bos={args.bos}: with --infill a prompt always starts a document; leave out --bos")
    if args.infill and args.ignore_eot:
        raise UserError("--infill: the filled-in text ends at an end-of-text token; leave out --ignore_eot")
    for prompt in args.prompts if args.infill else []:
        if prompt.count(HOLE) != 1:
            raise UserError(f"--infill needs one {HOLE} in each prompt; {prompt[:40]!r} has {prompt.count(HOLE)}")
    return args


def check_chat(args: argparse.Namespace) -> None:
    """Checks the flags of --chat."""
    if args.infill:
        raise UserError("--infill: cannot be combined with --chat; leave out one of the two")
    if args.special_tokens:
        raise UserError("--special_tokens=1: messages are always text; leave it out with --chat")
    if not args.prompts:
        raise UserError("--chat needs a question; give one with --prompt or --prompt_file")


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, read_flags)

import numpy as np
import torch
from torch import Tensor

from data.tokenizers.fim import infill_prompt
from data.tokenizers.tokenizer import Tokenizer
from eval.chat_format import ChatFormat, open_chat_format
from eval.encoding import encode_prompt
from eval.model import load_model_tokenizer
from eval.text_stream import TextStream
from model.formats.pretrained import load_model
from model.gpt import GPT
from model.kv_cache import KVCache
from util.device import choose_device

# --- sampling loop --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing a token.

    Logits are divided by `temperature` (0: always the most likely token). The `top_k` most likely tokens are kept (0:
    all), then the smallest set of the most likely of these with probability `top_p` (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, seed: int = 0, samples: int = 1
) -> Iterator[list[int]]:
    """Continues each prompt `samples` times. Yields the next token of every row, `max_new_tokens` times.

    Rows are ordered by prompt, then by sample. Each row has a random generator on the CPU, seeded with the seed, the
    prompt and the sample. So a row does not depend on the other rows, and not on the device except for the rounding
    of logits.

    The model sees the last `n_positions` tokens. Up to that length a token costs the work of one position, because
    keys and values are cached. Beyond it the positions of all tokens change with every token, so the whole
    window is computed for each token.

    Uses the caller's autocast context. The mode of the model is restored, and gradients are disabled only, during
    each forward pass. Raises ValueError for an empty prompt and FloatingPointError if logits are not finite.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token; a new document starts with the end-of-text token")
    limit = model.config.n_positions
    texts = [prompt[-limit:] for prompt in prompts]
    cache = KVCache(min(max(map(len, texts)) + max_new_tokens, limit))
    logits = prefill(model, texts, cache).repeat_interleave(samples, dim=0)
    cache.repeat(samples)
    texts = [text.copy() for text in texts for _ in range(samples)]
    cached = list(range(len(texts)))  # the rows whose keys and values are in the cache
    generators = [row_generator(seed, p, s) for p in range(len(prompts)) for s in range(samples)]
    for step in range(1, max_new_tokens + 1):
        tokens = draw(logits, sampling, generators)
        yield tokens
        if step < max_new_tokens:
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            cached = next_logits(model, texts, cache, cached, logits)


def next_logits(model: GPT, texts: list[list[int]], cache: KVCache, cached: list[int], logits: Tensor) -> list[int]:
    """Writes the logits after the last token of each text into `logits`. Returns the rows that are still cached."""
    limit = model.config.n_positions

    # Rows that have outgrown the window leave the cache.
    fitting = [row for row in cached if len(texts[row]) <= limit]
    if fitting != cached:
        cache.keep([cached.index(row) for row in fitting], max((len(texts[row]) - 1 for row in fitting), default=0))
    if fitting:
        logits[fitting] = decode_step(model, [texts[row] for row in fitting], cache)
    if outgrown := [row for row in range(len(texts)) if len(texts[row]) > limit]:
        logits[outgrown] = prefill(model, [texts[row][-limit:] for row in outgrown])
    return fitting


def prefill(model: GPT, texts: list[list[int]], cache: KVCache | None = None) -> Tensor:
    """Returns the logits (rows, vocab_size) after whole texts, fp32 on the CPU. Fills an empty `cache`, if given.

    Shorter texts are padded at the end, where no earlier token attends to the padding.
    """
    idx = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(idx, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    last = torch.tensor([len(text) - 1 for text in texts])
    return forward(model, idx, cache, None, last)


def decode_step(model: GPT, texts: list[list[int]], cache: KVCache) -> Tensor:
    """Returns the logits after texts of which all tokens except the last are in the cache. Adds the last to it."""
    idx = torch.tensor([text[-1:] for text in texts])
    positions = torch.tensor([[len(text) - 1] for text in texts])
    one_length = bool((positions == positions[0]).all())
    return forward(model, idx, cache, None if one_length else positions, torch.zeros(len(texts), dtype=torch.long))


@torch.no_grad()
def forward(model: GPT, idx: Tensor, cache: KVCache | None, positions: Tensor | None, last: Tensor) -> Tensor:
    """Calls the model in eval mode, with inputs from the CPU and logits to the CPU."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)  # FSDP may keep its shards in CPU memory but compute on the GPU
    device = parameter.device if mesh is None else torch.device(mesh.device_type)
    positions = None if positions is None else positions.to(device)
    was_training = model.training
    try:
        model.eval()
        return model(idx.to(device), positions=positions, cache=cache, last=last.to(device)).float().cpu()
    finally:
        model.train(was_training)


def row_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """Returns the random generator of one row."""
    state = np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """Draws a token for each row of logits (rows, vocab_size), with one random number from the row's generator."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    ids, weights = candidates(logits, sampling)
    cumulative = weights.cumsum(dim=-1)
    cumulative /= cumulative[:, -1:].clone()
    numbers = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    return ids.gather(-1, torch.searchsorted(cumulative, numbers, right=True)).flatten().tolist()


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Returns the ids to draw from, (rows, n), and their weights in double precision. The temperature is above 0.

    Tokens that top_p excludes have weight 0. Ids are in ascending order. So the rounding of nearly equal logits, which
    would change an order by likelihood, does not change which token a random number selects.
    """
    size = logits.size(-1)
    scores = (logits.double() - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return torch.arange(size).expand_as(logits), scores.softmax(dim=-1)
    # For top_p the most likely tokens nearly always suffice. Sorting the whole vocabulary takes ten times as long.
    kept = min(sampling.top_k or TOP_P_CANDIDATES, size)
    best, ids = scores.topk(kept)  # most likely first
    total = (best if sampling.top_k else scores).logsumexp(dim=-1, keepdim=True)
    weights = (best - total).exp()
    if not sampling.top_k and kept < size and not bool((weights.sum(dim=-1) >= sampling.top_p).all()):
        best, ids = scores.sort(dim=-1, descending=True)
        weights = (best - total).exp()
    if sampling.top_p < 1:
        weights[weights.cumsum(dim=-1) - weights >= sampling.top_p] = 0  # the tokens before it have enough probability
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(-1, order)


# --- the command ----------------------------------------------------------------------------------


@dataclass
class Row:
    """A prompt and one of its continuations, as text to print."""

    ready: str  # text that is final but not printed yet
    after: str  # text after the continuation
    stream: TextStream


def make_rows(args: argparse.Namespace, tokenizer: Tokenizer, n_positions: int) -> tuple[list[list[int]], list[Row]]:
    """Returns the ids of each prompt, and all rows."""
    prompts, rows = [], []
    for text in args.prompts:
        before, after = text.split(HOLE) if args.infill else (text, "")
        if args.infill:  # a rearranged document, which starts as documents do
            begin, ids = tokenizer.bos_tokens, infill_prompt(before, after, tokenizer)
        else:
            bos = None if args.bos is None else bool(args.bos)
            begin, ids = encode_prompt(tokenizer, text, bos, args.special_tokens != 0)
        prompts.append([*begin, *ids])
        if args.infill and len(prompts[-1]) + args.max_new_tokens > n_positions:
            raise UserError(
                f"--infill: a prompt of {len(prompts[-1])} tokens and --max_new_tokens={args.max_new_tokens} exceed"
                f" the model's context of {n_positions}; shorten one of the two"
            )
        for _ in range(args.num_samples):
            ends = [] if args.ignore_eot else [tokenizer.end_of_text]
            stream = TextStream(tokenizer, args.stop, ends, at_start=args.infill or not ids)
            rows.append(Row(before if args.infill else tokenizer.decode(ids), after, stream))
    return prompts, rows


def make_chat_rows(args: argparse.Namespace, chat: ChatFormat, n_positions: int) -> tuple[list[list[int]], list[Row]]:
    """Returns the ids of each conversation up to the reply, and the rows of all replies."""
    prompts, rows = [], []
    for place, messages in questions(args.prompts, args.system):
        try:
            ids = chat.encode(messages)
        except ValueError as e:
            raise UserError(f"{place}{e}") from e
        if len(ids) >= n_positions:
            raise UserError(
                f"{place}: the conversation has {len(ids):,} tokens, but the model's context has {n_positions:,};"
                " shorten it"
            )
        prompts.append(ids)
        rows += [Row("", "", chat.stream(ids, args.stop, args.ignore_eot)) for _ in range(args.num_samples)]
    return prompts, rows


def print_rows(steps: Iterator[list[int]], rows: list[Row]) -> None:
    """Prints the rows one after another, the first unfinished row while it is generated, until all are finished."""
    current = 0
    print(rows[0].ready, end="", flush=True)
    rows[0].ready = ""
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            row.ready += row.stream.add(token)
        while True:
            row = rows[current]
            print(row.ready, end="", flush=True)
            row.ready = ""
            if not row.stream.ended:
                break
            print(f"{row.after}\n{'-' * 40}", flush=True)
            current += 1
            if current == len(rows):
                return
    for row in rows[current:]:
        print(f"{row.ready}{row.stream.finish()}{row.after}\n{'-' * 40}", flush=True)


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    model, flags, found = load_model(args.checkpoint, device)
    tokenizer = load_model_tokenizer(args.tokenizer, found, flags)
    if args.chat:
        chat = open_chat_format(args.chat_template, args.bos, tokenizer, flags, found)
        prompts, rows = make_chat_rows(args, chat, model.config.n_positions)
    else:
        prompts, rows = make_rows(args, tokenizer, model.config.n_positions)
    sampling, dtype = Sampling(args.temperature, args.top_k, args.top_p), getattr(torch, args.dtype)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            print_rows(generate(model, prompts, args.max_new_tokens, sampling, args.seed, args.num_samples), rows)
    except FloatingPointError as error:
        raise UserError(f"{found}: {error} in {args.dtype}; try --dtype=float32, or another checkpoint") from error


if __name__ == "__main__":
    run_command(lambda: main(args))
