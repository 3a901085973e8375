"""Text generation: `python eval/generate.py --checkpoint RUN_OR_CHECKPOINT --prompt "..."`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from util.command import parse_first
from util.errors import CommandParser, UserError, run_command, user_errors
from util.launcher import launched_world_size
from util.values import user_path

HOLE = "<FILL_ME>"
TEMPERATURE, TOP_K = 0.8, 50  # the defaults here and for the samples of a run
TOP_P_CANDIDATES = 1024  # the number of most likely tokens that top_p looks at first


# --- flags ----------------------------------------------------------------------------------------


def read_prompt_file(name: str) -> str:
    """Reads a UTF-8 file; "-" is stdin."""
    with user_errors(f"--prompt_file={name}"):
        content = sys.stdin.buffer.read() if name == "-" else user_path(name).read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"--prompt_file={name}: not UTF-8 at byte {e.start}; convert it first") from e
    if not text:
        raise UserError(f"--prompt_file={name}: empty file; leave out the flag to start a new document")
    return text


def check_prompt(text: str) -> str:
    """Returns the --prompt if it is valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # Python represents invalid bytes of the command line as surrogates
        raise UserError("--prompt: not UTF-8; convert it first") from e
    return text


def check_stop(text: str) -> str:
    """Returns the --stop string if it is not empty."""
    if not text:
        raise UserError("--stop: an empty string would stop immediately; leave out the flag")
    return text


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
        type=check_prompt,
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
    add("--infill", action="store_true", help=f"fill in the {HOLE} in each prompt (models trained with --fim_rate)")
    add(
        "--bos",
        type=int,
        choices=[0, 1],
        help="1: put the token that documents start with before each prompt; 0: no token (default: the tokens that the"
        " tokenizer adds; GPT-2's adds none)",
    )
    add(
        "--special_tokens",
        type=int,
        choices=[0, 1],
        default=1,
        help="1: <|endoftext|> and other special tokens in a prompt are tokens; 0: they are text (default: 1)",
    )
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=int, default=100)
    add(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help="0: always the most likely token (default: %(default)s, as for the samples of a run)",
    )
    add("--top_k", type=int, default=TOP_K, help="sample from the k most likely tokens; 0: all (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability; 1: all")
    add("--stop", action="append", default=[], type=check_stop, help="end before this string; may be repeated")
    add("--ignore_eot", action="store_true", help="continue after the end-of-text token")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of matrix products")
    return parser


def read_flags() -> argparse.Namespace:
    """Parses and checks the command line, and reads the prompt files."""
    args = parser().parse_args()
    if launched_world_size() > 1:
        raise UserError("eval/generate.py runs in one process; start it with python instead of torchrun")
    args.prompts = args.prompts or [""]
    if args.max_new_tokens < 1 or args.num_samples < 1 or args.top_k < 0 or not 0 <= args.temperature < float("inf"):
        raise UserError("--max_new_tokens and --num_samples must be at least 1, --temperature and --top_k at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must be above 0 and at most 1, which keeps all tokens")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} must be at least 0")
    if args.infill and args.bos is not None:
        raise UserError(f"--bos={args.bos}: with --infill a prompt always starts a document; leave out --bos")
    if args.infill and args.ignore_eot:
        raise UserError("--infill: the filled-in text ends at an end-of-text token; leave out --ignore_eot")
    for prompt in args.prompts if args.infill else []:
        if prompt.count(HOLE) != 1:
            raise UserError(f"--infill needs one {HOLE} in each prompt; {prompt[:40]!r} has {prompt.count(HOLE)}")
    return args


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, read_flags)

import numpy as np
import torch
from torch import Tensor

from data.tokenizers.fim import infill_prompt
from data.tokenizers.tokenizer import Tokenizer
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
            begin, ids = encode_prompt(tokenizer, text, bos, bool(args.special_tokens))
        prompts.append([*begin, *ids])
        if args.infill and len(prompts[-1]) + args.max_new_tokens > n_positions:
            raise UserError(
                f"--infill: a prompt of {len(prompts[-1])} tokens and --max_new_tokens={args.max_new_tokens} exceed"
                f" the model's context of {n_positions}; shorten one of the two"
            )
        for _ in range(args.num_samples):
            end = None if args.ignore_eot else tokenizer.end_of_text
            stream = TextStream(tokenizer, args.stop, end, at_start=args.infill or not ids)
            rows.append(Row(before if args.infill else tokenizer.decode(ids), after, stream))
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
    prompts, rows = make_rows(args, tokenizer, model.config.n_positions)
    sampling, dtype = Sampling(args.temperature, args.top_k, args.top_p), getattr(torch, args.dtype)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            print_rows(generate(model, prompts, args.max_new_tokens, sampling, args.seed, args.num_samples), rows)
    except FloatingPointError as error:
        raise UserError(f"{found}: {error} in {args.dtype}; try --dtype=float32, or another checkpoint") from error


if __name__ == "__main__":
    run_command(lambda: main(args))
