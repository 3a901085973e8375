"""Text from a model: `python eval/generate.py --checkpoint RUN_OR_CHECKPOINT --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.errors import CommandParser, UserError, one_line_errors, run_command

HOLE = "<FILL_ME>"
FEW = 1024  # tokens among which top_p looks first


def file_text(name: str) -> str:
    """All of a UTF-8 file, - being stdin. Raises UserError if it cannot be read or is empty."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode()
    except OSError as e:
        raise UserError(f"--prompt_file={name}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt_file={name}: not UTF-8 at byte {e.start}; convert it first") from e
    if not text:
        raise UserError(f"--prompt_file={name}: empty; leave it out for a new document")
    return text


def prompt_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:  # bytes of the command line that were none
        raise UserError("--prompt: not UTF-8; convert it first") from e
    return text


def stop_text(text: str) -> str:
    if not text:
        raise UserError("--stop: an empty string would stop at once; leave it out")
    return text


def parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an output_dir, one checkpoint in it, or hf:FOLDER_OR_NAME, ...")
    add("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the run's)")
    add(
        "--prompt",
        dest="prompts",
        action="append",
        type=prompt_text,
        metavar="TEXT",
        help="text to continue; empty: a new document",
    )
    add(
        "--prompt_file",
        dest="prompts",
        action="append",
        type=file_text,
        metavar="FILE",
        help="a file whose whole text is a prompt, - is stdin; both flags may be repeated: a batch of prompts",
    )
    add("--infill", action="store_true", help=f"fill the one {HOLE} in each prompt (a model of --fim_rate)")
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=int, default=100)
    add("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    add("--top_k", type=int, default=0, help="sample among the k likeliest; 0: all")
    add("--top_p", type=float, default=1.0, help="sample among the fewest likeliest that have this probability; 1: all")
    add("--stop", action="append", default=[], type=stop_text, help="end before this string; may be repeated")
    add("--ignore_eot", action="store_true", help="go on after the end-of-text token")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of computing")
    return parser


def read_flags() -> argparse.Namespace:
    """The command line, prompts read. Raises UserError for what is wrong with it."""
    args = parser().parse_args()
    if cli.my_rank()[1] > 1:
        raise UserError("eval/generate.py runs in one process; start it with python instead of torchrun")
    args.prompts = args.prompts or [""]
    if args.max_new_tokens < 1 or args.num_samples < 1 or args.top_k < 0 or not 0 <= args.temperature < float("inf"):
        raise UserError("--max_new_tokens and --num_samples must be at least 1, --temperature and --top_k at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must be above 0 and at most 1, where it keeps all tokens")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} must be at least 0")
    if args.infill and args.ignore_eot:
        raise UserError("--infill: what fills the hole ends with an end-of-text token; leave out --ignore_eot")
    for prompt in args.prompts if args.infill else []:
        if prompt.count(HOLE) != 1:
            raise UserError(f"--infill wants one {HOLE} in a prompt; {prompt[:40]!r} has {prompt.count(HOLE)}")
    return args


if __name__ == "__main__":
    with one_line_errors():
        args = read_flags()  # before torch is imported, so that --help and mistakes are answered at once

import numpy as np
import torch
from torch import Tensor

from data.tokenizers.fim import infill_prompt
from data.tokenizers.tokenizer import Tokenizer
from eval.model import tokenizer_of
from eval.text_stream import TextStream
from model.formats.pretrained import load_model
from model.gpt import GPT
from model.kv_cache import KVCache
from util.device import choose_device


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: logits over `temperature` (0: always the likeliest), then among the `top_k` likeliest
    (0: all), then among the fewest likeliest of these that have probability `top_p` (Holtzman et al. 2020)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, seed: int = 0, samples: int = 1
) -> Iterator[list[int]]:
    """Continues each prompt `samples` times; yields the next token of every row, `max_new_tokens` times.

    Rows are prompt by prompt, sample by sample. A row draws from a generator of its own, seeded by seed, prompt and
    sample, on the CPU: its text depends neither on the other rows nor on the device, but for the rounding of the
    logits. The model sees the last `n_positions` tokens. Until a row has as many, a token costs one position's work;
    from then on every position moves with every token, keys and values are of no more use, and each token costs a
    forward pass over the whole window. Computes under the autocast in force where it is iterated over. The mode of
    the model and of autograd are changed only while a step is computed. Raises ValueError for an empty prompt,
    FloatingPointError if logits are not finite.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token; a new document begins with the end-of-text token")
    limit = model.config.n_positions
    texts = [prompt[-limit:] for prompt in prompts]
    cache = KVCache(min(max(map(len, texts)) + max_new_tokens, limit))
    logits = read(model, texts, cache).repeat_interleave(samples, dim=0)
    cache.repeat(samples)
    texts = [text.copy() for text in texts for _ in range(samples)]
    cached = list(range(len(texts)))  # the rows in the cache
    generators = [row_generator(seed, p, s) for p in range(len(prompts)) for s in range(samples)]
    for step in range(1, max_new_tokens + 1):
        tokens = draw(logits, sampling, generators)
        yield tokens
        if step == max_new_tokens:
            return
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        inside = [row for row in cached if len(texts[row]) <= limit]
        if inside != cached:
            cache.keep([cached.index(row) for row in inside], max((len(texts[r]) - 1 for r in inside), default=0))
            cached = inside
        if cached:
            logits[cached] = read_on(model, [texts[row] for row in cached], cache)
        if moving := [row for row in range(len(texts)) if len(texts[row]) > limit]:
            logits[moving] = read(model, [texts[row][-limit:] for row in moving])


def read(model: GPT, texts: list[list[int]], cache: KVCache | None = None) -> Tensor:
    """Logits (rows, vocab_size) after whole texts, fp32 on the CPU. Keeps them in an empty `cache`, if given.

    Shorter texts are filled up at their ends, where no token before can see it.
    """
    idx = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(idx, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    last = torch.tensor([len(text) - 1 for text in texts])
    return forward(model, idx, cache, None, last)


def read_on(model: GPT, texts: list[list[int]], cache: KVCache) -> Tensor:
    """The same where all but the last token of each text is in the cache."""
    idx = torch.tensor([text[-1:] for text in texts])
    places = torch.tensor([[len(text) - 1] for text in texts])
    one_length = bool((places == places[0]).all())
    return forward(model, idx, cache, None if one_length else places, torch.zeros(len(texts), dtype=torch.long))


@torch.no_grad()
def forward(model: GPT, idx: Tensor, cache: KVCache | None, positions: Tensor | None, last: Tensor) -> Tensor:
    """`model.forward` in eval mode, from and to the CPU."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)  # FSDP may keep its shards in host memory, and compute elsewhere
    device = parameter.device if mesh is None else torch.device(mesh.device_type)
    positions = None if positions is None else positions.to(device)
    was_training = model.training
    try:
        model.eval()
        return model(idx.to(device), positions=positions, cache=cache, last=last.to(device)).float().cpu()
    finally:
        model.train(was_training)


def row_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """A token of each row of logits (rows, vocab_size), from one random number of the row's generator."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    ids, weights = candidates(logits, sampling)
    up_to = weights.cumsum(dim=-1)
    up_to /= up_to[:, -1:].clone()
    numbers = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    return ids.gather(-1, torch.searchsorted(up_to, numbers, right=True)).flatten().tolist()


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids of the tokens to draw among, (rows, n), and their weights in double precision; `sampling.temperature` > 0.

    What top_p leaves out weighs 0. Ids ascend: how rounding orders tokens that are nearly as likely must not decide
    which of them a number draws.
    """
    size = logits.size(-1)
    scores = (logits.double() - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return torch.arange(size).expand_as(logits), scores.softmax(dim=-1)
    # The nucleus of top_p is nearly always among a few; to sort the whole vocabulary takes ten times as long.
    kept = min(sampling.top_k or FEW, size)
    best, ids = scores.topk(kept)  # likeliest first
    total = (best if sampling.top_k else scores).logsumexp(dim=-1, keepdim=True)
    weights = (best - total).exp()
    if not sampling.top_k and kept < size and not bool((weights.sum(dim=-1) >= sampling.top_p).all()):
        best, ids = scores.sort(dim=-1, descending=True)
        weights = (best - total).exp()
    if sampling.top_p < 1:
        weights[weights.cumsum(dim=-1) - weights >= sampling.top_p] = 0  # those before are enough
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(-1, order)


@dataclass
class Row:
    """A prompt and one of its continuations, on their way to the terminal."""

    ready: str  # text to print when it is the row's turn
    after: str  # what follows the continuation
    stream: TextStream


def rows_of(args: argparse.Namespace, tokenizer: Tokenizer, n_positions: int) -> tuple[list[list[int]], list[Row]]:
    """The ids of each prompt, and the rows of all."""
    prompts, rows = [], []
    for text in args.prompts:
        before, after = text.split(HOLE) if args.infill else (text, "")
        ids = infill_prompt(before, after, tokenizer) if args.infill else tokenizer.encode(text)
        prompts.append([*tokenizer.bos_tokens, *ids])
        if args.infill and len(prompts[-1]) + args.max_new_tokens > n_positions:
            raise UserError(
                f"--infill: a prompt of {len(prompts[-1])} tokens and --max_new_tokens={args.max_new_tokens} exceed the"
                f" {n_positions} that the model sees; shorten one of the two"
            )
        for _ in range(args.num_samples):
            end = None if args.ignore_eot else tokenizer.end_of_text
            stream = TextStream(tokenizer, args.stop, end, at_start=args.infill or not ids)
            rows.append(Row(before if args.infill else tokenizer.decode(ids), after, stream))
    return prompts, rows


def print_rows(steps: Iterator[list[int]], rows: list[Row]) -> None:
    """Prints the rows one after another, the foremost unfinished one as its text comes, until all are finished."""
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
    tokenizer = tokenizer_of(args.tokenizer, found, flags)
    prompts, rows = rows_of(args, tokenizer, model.config.n_positions)
    sampling, dtype = Sampling(args.temperature, args.top_k, args.top_p), getattr(torch, args.dtype)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            print_rows(generate(model, prompts, args.max_new_tokens, sampling, args.seed, args.num_samples), rows)
    except FloatingPointError as error:
        raise UserError(f"{found}: {error} in {args.dtype}; try --dtype=float32, or another checkpoint") from error


if __name__ == "__main__":
    run_command(lambda: main(args))
