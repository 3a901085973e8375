"""Tasks of EleutherAI's lm-evaluation-harness: `python eval/lm_eval.py --checkpoint RUN --tasks hellaswag,gsm8k`.

The library runs in this process and asks the checkpoint itself; nothing is converted. Any task goes that it has, or
that a .yaml in --include_path describes, given by name, pattern, tag or group. Install it with

    pip install 'lm-eval>=0.4.13,<0.5'

Texts become tokens, contexts are cut and answers end as with its own models (`lm_eval --model hf`, which is also what
to use for a Hugging Face folder), but the name of a special token in a text stays text.
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
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # also because this file has the library's name

from eval import cli
from util.errors import CommandParser, UserError, closest, one_line_errors, run_command


def parser() -> CommandParser:
    parser = cli.subject_parser(__doc__, hf=False)
    add = parser.add_argument
    add("--hf", type=refuse_hf, help="refused: for a Hugging Face folder there is `lm_eval --model hf`")
    add("--tasks", required=True, help="names with commas between them; * stands for anything")
    add("--num_fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)")
    add("--limit", type=int, default=0, metavar="N", help="the first N examples of each task only; 0: all")
    add("--include_path", type=Path, metavar="DIR", help="a folder with .yaml files of tasks of your own")
    add("--log_samples", action="store_true", help="put every question and answer into --output, too")
    add("--confirm_run_unsafe_code", action="store_true", help="let tasks run the code that the model writes")
    return parser


def refuse_hf(name: str) -> NoReturn:
    raise UserError(f"--hf={name}: only a --checkpoint here; use `lm_eval --model hf --model_args pretrained={name}`")


def check(args: Namespace) -> None:
    """Raises UserError for what is wrong with the flags, before anything is loaded."""
    cli.check(args)
    if cli.my_rank()[1] > 1:
        raise UserError("eval/lm_eval.py runs in one process; start it with python instead of torchrun")
    if not names_of(args):
        raise UserError("--tasks is empty; name one, hellaswag say")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot={args.num_fewshot} must be at least 0")
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path={args.include_path}: no such folder")
    if args.log_samples and not args.output:
        raise UserError("--log_samples: name a file for them with --output")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; pip install 'lm-eval>=0.4.13,<0.5'")


def names_of(args: Namespace) -> list[str]:
    return [name.strip() for name in args.tasks.split(",") if name.strip()]


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once
        check(args)

import torch

from eval.generate import Sampling, generate
from eval.model import Subject, open_subject
from eval.scoring import Request
from eval.text_stream import TextStream

MAX_SHARED = 1024  # tokens of endings in a row: all its positions meet all others, whether or not they see them
MAX_NEW_TOKENS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"  # the first given counts
DEFAULT_NEW_TOKENS = 256  # as the library's models; also the top_k of those that sample
DEFAULT_TOP_K = 50
Pair = tuple[list[int], list[int]]


def group(pairs: list[Pair]) -> tuple[list[Request], list[tuple[int, int]]]:
    """Requests that share the contexts of (context, ending) pairs, and each pair's request and number there.

    A context of one token is its row's beginning anyway, with no work to share; a task may ask for thousands of
    endings of it.
    """
    requests: list[Request] = []
    places: list[tuple[int, int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # of each context: its newest request, tokens of endings in it
    for context, ending in pairs:
        number, size = last.get(tuple(context), (-1, 0))
        if number < 0 or size + len(ending) > MAX_SHARED or len(context) == 1:
            number, size = len(requests), 0
            requests.append(Request(context, []))
        requests[number].endings.append(ending)
        last[tuple(context)] = number, size + len(ending)
        places.append((number, len(requests[number].endings) - 1))
    return requests, places


def loglikelihoods(subject: Subject, pairs: list[Pair]) -> list[tuple[float, bool]]:
    """Of the ending of each pair: its log-likelihood in nats, and whether each token is the likeliest.

    An empty context is what a text begins with; an empty ending is certain.
    """
    asked = [i for i, (_, ending) in enumerate(pairs) if ending]
    requests, places = group([(pairs[i][0] or [subject.before_text], pairs[i][1]) for i in asked])
    scores = subject.score(requests, "loglikelihood")
    found = [(0.0, True)] * len(pairs)
    for i, (request, ending) in zip(asked, places, strict=True):
        score = scores[request][ending]
        found[i] = -score.loss, score.greedy
    return found


def text_loglikelihoods(subject: Subject, texts: list[str]) -> list[float]:
    """Of whole texts, each after an end-of-text token, in windows of what the model sees, one token of context at
    least: how `rows_of` cuts a long ending is how the library's rolling windows lie."""
    return [found for found, _ in loglikelihoods(subject, [([], subject.encode(text)) for text in texts])]


@dataclass(frozen=True)
class Wish:
    """How an answer is to be made."""

    sampling: Sampling
    stop: tuple[str, ...]  # the answer ends before the first of these
    max_new_tokens: int


def wish_of(settings: dict[str, Any]) -> Wish:
    """A task's generation_kwargs, with what the library's Hugging Face models understand by them.

    Raises UserError for a setting that is not known here.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    limits = [left.pop(name, None) for name in MAX_NEW_TOKENS]
    temperature = float(left.pop("temperature", None) or 0)
    if left.pop("do_sample", None) is False:  # unless said, the temperature decides
        temperature = 0
    top_k, top_p = left.pop("top_k", DEFAULT_TOP_K), left.pop("top_p", None)
    if left.pop("num_beams", 1) != 1 or left:
        unknown = ", ".join(left) or "num_beams"
        raise UserError(f"--tasks: one has {unknown} in its generation_kwargs, which generation here does not know")
    return Wish(
        Sampling(temperature, int(top_k or 0), float(1 if top_p is None else top_p)),
        tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        next((int(limit) for limit in limits if limit is not None), DEFAULT_NEW_TOKENS),
    )


def answers(subject: Subject, asked: list[tuple[str, dict[str, Any]]], dtype: torch.dtype) -> list[str]:
    """What the model writes after each context, in the way that the settings beside it say."""
    from tqdm import tqdm

    alike: dict[Wish, list[int]] = defaultdict(list)
    for i, (_, settings) in enumerate(asked):
        alike[wish_of(settings)].append(i)
    prompts = [subject.encode(context) or [subject.before_text] for context, _ in asked]
    found = [""] * len(asked)
    autocast = torch.autocast(subject.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with tqdm(total=len(asked), desc="generate_until", unit="", disable=None) as bar, autocast:
        for wish, members in alike.items():
            for batch in batches(members, prompts, wish, subject):
                texts = answer(subject, [crop(prompts[i], wish, subject.limit) for i in batch], wish, seed=batch[0])
                for i, text in zip(batch, texts, strict=True):
                    found[i] = text
                bar.update(len(batch))
    return found


def crop(prompt: list[int], wish: Wish, limit: int) -> list[int]:
    """The end of a prompt that leaves room for the answer; all of it where there is no such, and the window moves."""
    room = limit - wish.max_new_tokens
    return prompt[-room:] if room > 0 else prompt


def batches(members: list[int], prompts: list[list[int]], wish: Wish, subject: Subject) -> list[list[int]]:
    """Prompts of about one length together, longest first, so many as `batch_tokens` allows with their answers."""
    found: list[list[int]] = []
    for i in sorted(members, key=lambda i: (-len(prompts[i]), i)):
        if found:
            row = min(len(crop(prompts[found[-1][0]], wish, subject.limit)) + wish.max_new_tokens, subject.limit)
        if not found or (len(found[-1]) + 1) * row > subject.batch_tokens:
            found.append([])
        found[-1].append(i)
    return found


def answer(subject: Subject, prompts: list[list[int]], wish: Wish, seed: int) -> list[str]:
    """The continuation of each prompt up to a stop string, end-of-text or the limit, without special tokens."""
    tokenizer, gpt = subject.tokenizer, subject.gpt
    assert tokenizer is not None and gpt is not None, "only a checkpoint is opened"
    end = tokenizer.end_of_text
    names = {i: name for name, i in tokenizer.special.items()}
    stop = [*wish.stop, names[end]] if end in names else wish.stop
    streams = [TextStream(tokenizer, stop, end, at_start=True) for _ in prompts]
    texts = [""] * len(prompts)
    for tokens in generate(gpt, prompts, wish.max_new_tokens, wish.sampling, seed):
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if token == end or token not in names:
                texts[row] += stream.add(token)
        if all(stream.ended for stream in streams):
            break
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def adapter(subject: Subject, dtype: torch.dtype) -> Any:
    """The subject as one of the library's models, an lm_eval.api.model.LM; `asked` once it was asked anything."""
    from lm_eval.api.model import TemplateLM

    class Checkpoint(TemplateLM):
        asked = False
        eot_token_id = subject.end_of_text
        prefix_token_id = subject.before_text
        max_length = subject.limit
        max_gen_toks = DEFAULT_NEW_TOKENS

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return subject.encode(string)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = True
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(subject, [(context, ending) for _, context, ending in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            self.asked = True
            return text_loglikelihoods(subject, [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.asked = True
            return answers(subject, [request.args for request in requests], dtype)

        def get_model_info(self) -> dict[str, Any]:
            """For the results' "config"."""
            about = {"checkpoint": subject.name, "step": subject.step, "model_dtype": str(dtype)}
            return about | {"model_num_parameters": subject.gpt.num_params() if subject.gpt else None}

    return Checkpoint()


def find_tasks(args: Namespace) -> tuple[list[str], Any]:
    """The names that --tasks stands for, and the library's TaskManager that knows them.

    Raises UserError for one that it does not.
    """
    from lm_eval.tasks import TaskManager

    folder = str(args.include_path) if args.include_path else None
    wanted = names_of(args)
    if folder:  # to read the library's own fourteen thousand takes ten seconds
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(wanted) <= set(own.all_subtasks):
            return wanted, own
    manager = TaskManager(include_path=folder)
    for name in wanted:
        if not manager.match_tasks([name]):
            near = closest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"--tasks={args.tasks}: lm-eval knows no task {name}; {hint}")
    return manager.match_tasks(wanted), manager


def evaluate(args: Namespace, names: list[str], manager: Any, lm: Any) -> dict[str, Any]:
    """What the library's simple_evaluate finds.

    Raises UserError if it fails before it has asked the model anything: for want of a data set, say.
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
    except Exception as e:  # tasks are code and data of many hands
        if lm.asked:
            raise
        way_out = "; its data must be on this machine or within reach" if isinstance(e, OSError) else ""
        what = f"{type(e).__name__}: {str(e)[:300]}"
        raise UserError(f"--tasks={args.tasks}: lm-eval cannot prepare it ({what}){way_out}") from e


def main(args: Namespace) -> None:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what fails is said once, below
    names, manager = find_tasks(args)
    from lm_eval.utils import handle_non_serializable, make_table

    subject = open_subject(args)
    try:
        results = evaluate(args, names, manager, adapter(subject, getattr(torch, args.dtype)))
    except FloatingPointError as e:  # of generation
        raise UserError(f"{subject.name}: {e} in {args.dtype}; try --dtype=float32, or another checkpoint") from e
    first = f", the first {args.limit} examples" if args.limit else ""
    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    shown = "\n".join([f"{subject.name}, {args.dtype}{first}", *tables])
    cli.finish(args.output, json.loads(json.dumps(results, default=handle_non_serializable)), shown)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
