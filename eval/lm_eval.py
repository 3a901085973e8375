"""Tasks of EleutherAI's lm-evaluation-harness: `python eval/lm_eval.py --checkpoint RUN --tasks hellaswag,gsm8k`.

The library runs in this process and calls the checkpoint directly, without conversion. All of its tasks work, and tasks
described by a .yaml file in --include_path. Select them by name, pattern, tag or group. Install the library with

    pip install 'lm-eval>=0.4.13,<0.5'

Texts are encoded, contexts are cropped and answers end as with the library's Hugging Face models, with one exception:
the name of a special token inside a text is encoded as text. For a Hugging Face folder use `lm_eval --model hf`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # also because this file has the name of the library

from eval import cli
from util.command import parse_first
from util.errors import CommandParser, UserError, closest, run_command
from util.launcher import launched_world_size


def parser() -> CommandParser:
    parser = cli.eval_parser(__doc__, hf=False)
    add = parser.add_argument
    add("--hf", type=refuse_hf, help="not supported: use `lm_eval --model hf` for a Hugging Face folder")
    add("--tasks", required=True, help="comma-separated names; * matches anything")
    add("--num_fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)")
    add("--limit", type=int, default=0, metavar="N", help="only the first N examples of each task; 0: all")
    add("--include_path", type=Path, metavar="DIR", help="a folder with .yaml files of additional tasks")
    add("--log_samples", action="store_true", help="write every question and answer to --output too")
    add("--confirm_run_unsafe_code", action="store_true", help="allow tasks to run code that the model writes")
    return parser


def refuse_hf(name: str) -> NoReturn:
    """Points to the library's own command for Hugging Face folders."""
    raise UserError(
        f"--hf={name}: only --checkpoint is supported; use `lm_eval --model hf --model_args pretrained={name}`"
    )


def check(args: Namespace) -> None:
    """Checks the flags, before anything is loaded."""
    cli.check(args)
    if launched_world_size() > 1:
        raise UserError("eval/lm_eval.py runs in one process; start it with python instead of torchrun")
    if not task_names(args):
        raise UserError("--tasks is empty; name a task, for example hellaswag")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot={args.num_fewshot} must be at least 0")
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path={args.include_path}: no such folder")
    if args.log_samples and not args.output:
        raise UserError("--log_samples: name a file for the samples with --output")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; pip install 'lm-eval>=0.4.13,<0.5'")


def task_names(args: Namespace) -> list[str]:
    """Splits --tasks at commas."""
    return [name.strip() for name in args.tasks.split(",") if name.strip()]


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, lambda: parser().parse_args(), check)

import torch

from eval.generate import Sampling, generate
from eval.model import EvalModel, load_eval_model
from eval.scoring import Request, score_requests
from eval.text_stream import TextStream

MAX_SHARED = 1024  # tokens of continuations in a row: attention costs their square, although most pairs are masked
MAX_NEW_TOKENS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"  # the first one given is used
DEFAULT_NEW_TOKENS = 256  # the default of the library's models, as is the top_k
DEFAULT_TOP_K = 50
Pair = tuple[list[int], list[int]]


# --- log-likelihoods ------------------------------------------------------------------------------


def group(pairs: list[Pair]) -> tuple[list[Request], list[tuple[int, int]]]:
    """Groups (context, continuation) pairs by context.

    Returns the requests, and for each pair the number of its request and the number of its continuation there. A
    context of one token is not shared: it saves no work, and a task may have thousands of continuations for it.
    """
    requests: list[Request] = []
    places: list[tuple[int, int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # context → its last request, and the continuation tokens there
    for context, continuation in pairs:
        number, size = last.get(tuple(context), (-1, 0))
        if number < 0 or size + len(continuation) > MAX_SHARED or len(context) == 1:
            number, size = len(requests), 0
            requests.append(Request(context, []))
        requests[number].continuations.append(continuation)
        last[tuple(context)] = number, size + len(continuation)
        places.append((number, len(requests[number].continuations) - 1))
    return requests, places


def loglikelihoods(model: EvalModel, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """Returns the log-likelihood of each continuation in nats, and whether greedy decoding gives it.

    An empty context becomes BOS or end-of-text. An empty continuation has log-likelihood 0.
    """
    scored = [i for i, (_, continuation) in enumerate(pairs) if continuation]
    requests, places = group([(pairs[i][0] or model.text.bos_tokens, pairs[i][1]) for i in scored])
    scores = score_requests(model, requests, "loglikelihood")
    found = [(0.0, True)] * len(pairs)
    for i, (request, continuation) in zip(scored, places, strict=True):
        score = scores[request][continuation]
        found[i] = -score.loss, score.greedy
    return found


def text_loglikelihoods(model: EvalModel, texts: list[str]) -> list[float]:
    """Returns the log-likelihood of each text as a whole, after BOS or end-of-text.

    `to_rows` cuts a long continuation into the library's rolling windows, with one token of context at least.
    """
    return [found for found, _ in loglikelihoods(model, [([], model.text.encode(text)) for text in texts])]


# --- generation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling, the length limit, and the strings that end an answer."""

    sampling: Sampling
    stop: tuple[str, ...]
    max_new_tokens: int


def generation_settings(options: dict[str, Any]) -> GenerationSettings:
    """Converts a task's generation_kwargs, interpreted as the library's Hugging Face models do.

    An unknown option is an error.
    """
    left = dict(options)
    until = left.pop("until", None) or []
    limits = [left.pop(name, None) for name in MAX_NEW_TOKENS]
    temperature = float(left.pop("temperature", None) or 0)
    if left.pop("do_sample", None) is False:  # without do_sample the temperature decides
        temperature = 0
    top_k, top_p = left.pop("top_k", DEFAULT_TOP_K), left.pop("top_p", None)
    if left.pop("num_beams", 1) != 1 or left:
        unknown = ", ".join(left) or "num_beams"
        raise UserError(f"--tasks: a task has {unknown} in its generation_kwargs, which is not supported")
    return GenerationSettings(
        Sampling(temperature, int(top_k or 0), float(1 if top_p is None else top_p)),
        tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        next((int(limit) for limit in limits if limit is not None), DEFAULT_NEW_TOKENS),
    )


def answers(model: EvalModel, requests: list[tuple[str, dict[str, Any]]], dtype: torch.dtype) -> list[str]:
    """Returns the generated answer to each (context, generation_kwargs)."""
    from tqdm import tqdm

    by_settings: dict[GenerationSettings, list[int]] = defaultdict(list)
    for i, (_, options) in enumerate(requests):
        by_settings[generation_settings(options)].append(i)
    prompts = [model.text.encode(context) or model.text.bos_tokens for context, _ in requests]
    found = [""] * len(requests)
    autocast = torch.autocast(model.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with tqdm(total=len(requests), desc="generate_until", unit="", disable=None) as bar, autocast:
        for settings, members in by_settings.items():
            for batch in batches(members, prompts, settings, model):
                cropped = [crop(prompts[i], settings, model.n_positions) for i in batch]
                for i, text in zip(batch, answer(model, cropped, settings, seed=batch[0]), strict=True):
                    found[i] = text
                bar.update(len(batch))
    return found


def crop(prompt: list[int], settings: GenerationSettings, n_positions: int) -> list[int]:
    """Returns the end of a prompt that leaves room for the answer.

    If the answer alone may exceed the context, the prompt is returned unchanged, and generation moves its window.
    """
    room = n_positions - settings.max_new_tokens
    return prompt[-room:] if room > 0 else prompt


def batches(
    members: list[int], prompts: list[list[int]], settings: GenerationSettings, model: EvalModel
) -> list[list[int]]:
    """Groups prompts of similar length, longest first, so that with their answers they fit into `batch_tokens`."""
    found: list[list[int]] = []
    for i in sorted(members, key=lambda i: (-len(prompts[i]), i)):
        if found:
            longest = crop(prompts[found[-1][0]], settings, model.n_positions)
            row = min(len(longest) + settings.max_new_tokens, model.n_positions)
        if not found or (len(found[-1]) + 1) * row > model.batch_tokens:
            found.append([])
        found[-1].append(i)
    return found


def answer(model: EvalModel, prompts: list[list[int]], settings: GenerationSettings, seed: int) -> list[str]:
    """Continues each prompt up to a stop string, end-of-text or the length limit. Special tokens are left out."""
    assert model.checkpoint is not None and model.checkpoint.tokenizer is not None, "--hf is refused"
    tokenizer, gpt = model.checkpoint.tokenizer, model.checkpoint.gpt
    end = tokenizer.end_of_text
    names = {i: name for name, i in tokenizer.special.items()}
    stop = [*settings.stop, names[end]] if end in names else settings.stop
    streams = [TextStream(tokenizer, stop, [end], at_start=True) for _ in prompts]
    texts = [""] * len(prompts)
    for tokens in generate(gpt, prompts, settings.max_new_tokens, settings.sampling, seed):
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if token == end or token not in names:
                texts[row] += stream.add(token)
        if all(stream.ended for stream in streams):
            break
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


# --- the library ----------------------------------------------------------------------------------


def adapter(model: EvalModel, dtype: torch.dtype) -> Any:
    """Wraps the model as an lm_eval.api.model.LM. Its `used` is true after the first request."""
    from lm_eval.api.model import TemplateLM

    assert model.checkpoint is not None, "--hf is refused"
    gpt, step = model.checkpoint.gpt, model.checkpoint.step

    class CheckpointLM(TemplateLM):
        used = False
        eot_token_id = model.text.end_of_text
        prefix_token_id = model.text.bos_tokens[0]
        max_length = model.n_positions
        max_gen_toks = DEFAULT_NEW_TOKENS

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.text.encode(string)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.used = True
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            self.used = True
            return text_loglikelihoods(model, [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.used = True
            return answers(model, [request.args for request in requests], dtype)

        def get_model_info(self) -> dict[str, Any]:
            """Returns the entries for "config" in the results."""
            about = {"checkpoint": model.name, "step": step, "model_dtype": str(dtype)}
            return about | {"model_num_parameters": gpt.num_params()}

    return CheckpointLM()


def find_tasks(args: Namespace) -> tuple[list[str], Any]:
    """Returns the tasks that --tasks names, and the library's TaskManager that knows them."""
    from lm_eval.tasks import TaskManager

    folder = str(args.include_path) if args.include_path else None
    wanted = task_names(args)
    if folder:  # listing the library's 14,000 tasks takes ten seconds, so try the folder alone first
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(wanted) <= set(own.all_subtasks):
            return wanted, own
    manager = TaskManager(include_path=folder)
    for name in wanted:
        if not manager.match_tasks([name]):
            near = closest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks={args.tasks}: lm-eval has no task {name}; {hint}")
    return manager.match_tasks(wanted), manager


def evaluate(args: Namespace, names: list[str], manager: Any, lm: Any) -> dict[str, Any]:
    """Returns the results of the library's simple_evaluate.

    A failure before the first request, for example a missing data set, is a user error.
    """
    from lm_eval import simple_evaluate

    try:
        return simple_evaluate(
            model=lm,
            tasks=names,
            num_fewshot=args.num_fewshot,
            limit=args.limit or None,
            log_samples=args.log_samples,
            task_manager=manager,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    except Exception as e:  # tasks contain code and may raise anything
        if lm.used:
            raise
        hint = "; its data must be on this machine or downloadable" if isinstance(e, OSError) else ""
        what = f"{type(e).__name__}: {str(e)[:300]}"
        raise UserError(f"--tasks={args.tasks}: lm-eval cannot prepare it ({what}){hint}") from e


def main(args: Namespace) -> None:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings would repeat our error message
    names, manager = find_tasks(args)
    from lm_eval.utils import handle_non_serializable, make_table

    model = load_eval_model(args)
    try:
        results = evaluate(args, names, manager, adapter(model, getattr(torch, args.dtype)))
    except FloatingPointError as e:  # raised by generate
        raise UserError(f"{model.name}: {e} in {args.dtype}; try --dtype=float32, or another checkpoint") from e
    limit = f", the first {args.limit} examples" if args.limit else ""
    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    summary = "\n".join([f"{model.name}, {args.dtype}{limit}", *tables])
    cli.write_results(args.output, json.loads(json.dumps(results, default=handle_non_serializable)), summary)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
