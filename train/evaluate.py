"""Evaluation during training: validation, HellaSwag and samples. A failure is reported and training continues."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

from cfg.config import Config
from data.hellaswag import DEFAULT_OUTPUT, Example, find_source
from data.loader import Loader
from data.open import open_val_data
from data.tokenizers.tokenizer import Tokenizer
from eval import hellaswag
from eval.cli import TEMPERATURE, TOP_K
from eval.encoding import encode_prompt, text_encoder
from eval.generate import Sampling, generate
from eval.scoring import ScoringModel, gpt_forward, score_in_steps
from eval.validation import fixed_windows, summarize, windows_loss
from train import watchdog
from train.inputs import tokenizer_fingerprint
from train.interrupt import Interrupted, StopRequest
from train.parallel import ParallelModel, reshard
from util.errors import storage_error
from util.ranks import Ranks

T = TypeVar("T")
SAMPLING = Sampling(TEMPERATURE, TOP_K)
MIN_TOKENS = 4096  # of a batch of HellaSwag: without gradients that needs little memory


def is_due(every: int, step: int, config: Config) -> bool:
    """Returns whether something that happens `every` steps (0: only at the end) is due after `step`."""
    return step == config.num_iterations or (every > 0 and step % every == 0)


class Evaluator:
    """Opens the evaluation data at the start of a run, and evaluates the model when it is due."""

    def __init__(self, config: Config, ranks: Ranks, tokenizer: Tokenizer | None):
        self.config, self.ranks, self.tokenizer = config, ranks, tokenizer
        self.end_of_text = tokenizer.end_of_text if config.doc_mask and tokenizer else None
        # The ids before and of --sample_prompt.
        self.prompt = encode_prompt(tokenizer, config.sample_prompt) if tokenizer else ([0], [])
        self.val_data: Loader | None = None
        if config.input_val_bin:
            self.val_data = open_val_data(config, tokenizer_fingerprint(config, tokenizer))
        self.questions: hellaswag.Questions | None = None
        if config.hellaswag_every and tokenizer:
            self.questions = _open_hellaswag(config, ranks, tokenizer)

    def due(self, step: int) -> bool:
        """Returns whether an evaluation or a sample is due after `step`."""
        return bool(self._due(step))

    def run(self, model: ParallelModel, step: int, stop: StopRequest) -> dict[str, Any]:
        """Returns the results of the evaluations that are due after `step`, for its record.

        An evaluation that fails on any rank is reported and skipped. Raises Interrupted on all ranks if any rank was
        asked to stop.
        """
        found: dict[str, Any] = {}
        due = self._due(step)
        if "validation" in due:
            found |= self._validate(model, stop)
        if "HellaSwag" in due:
            found |= self._hellaswag(model, stop)
        return found

    def sample(self, model: ParallelModel, step: int, stop: StopRequest) -> str:
        """Returns generated text if a sample is due after `step`, and writes it to samples/.

        Returns "" if none is due, or if it failed or was interrupted. All ranks generate: a sharded model needs them.
        """
        if "sample" not in self._due(step):
            return ""
        try:
            return run_interruptible("sample", self._generate(model, step), model, self.ranks, stop, model.eager) or ""
        except Interrupted:
            return ""

    def _due(self, step: int) -> set[str]:
        """Returns which of validation, HellaSwag and sample are due after `step`."""
        c = self.config
        intervals = {"HellaSwag": c.hellaswag_every, "sample": c.sample_every}
        found = {name for name, every in intervals.items() if every and is_due(every, step, c)}
        return found | {"validation"} if self.val_data is not None and is_due(c.val_loss_every, step, c) else found

    def _validate(self, model: ParallelModel, stop: StopRequest) -> dict[str, Any]:
        """Returns val_loss and val_bpb over --val_max_steps batches: the same windows on any number of ranks."""
        config, ranks, data = self.config, self.ranks, self.val_data
        assert data is not None, "validation is due only with validation data"
        windows = fixed_windows(data.windows, config.val_max_steps * config.total_batch_size // config.sequence_length)
        token_bytes = self.tokenizer.byte_lengths(config.vocab_size) if self.tokenizer else None
        share = windows[ranks.rank :: ranks.world_size]
        rounds = -(-len(windows) // (config.batch_size * ranks.world_size))
        rows = config.batch_size
        work = windows_loss(model.gpt, data, share, rows, rounds, ranks.device, token_bytes, self.end_of_text)
        sums = run_interruptible("validation", work, model, ranks, stop, model.autocast)
        return dict(summarize(*ranks.sum_floats(sums))) if sums is not None else {}

    def _hellaswag(self, model: ParallelModel, stop: StopRequest) -> dict[str, Any]:
        """Returns HellaSwag's accuracies in both styles, the examples divided among the ranks."""
        config, ranks = self.config, self.ranks
        assert self.questions is not None, "HellaSwag is due only with its questions"
        tokens = max(config.batch_size * config.sequence_length, MIN_TOKENS)
        scoring = ScoringModel(gpt_forward(model.gpt), ranks, config.n_positions, tokens)
        work = score_in_steps(scoring, hellaswag.to_requests(self.questions))
        scores = run_interruptible("HellaSwag", work, model, ranks, stop, model.eager)
        return dict(hellaswag.to_record(hellaswag.accuracies(self.questions, scores))) if scores is not None else {}

    def _generate(self, model: ParallelModel, step: int) -> Generator[None, None, str]:
        """Generates the sample of `step` token by token, writes it, and returns it."""
        config, tokenizer = self.config, self.tokenizer
        begin, ids = self.prompt
        tokens = ids.copy()
        for (token,) in generate(model.gpt, [[*begin, *ids]], config.sample_tokens, SAMPLING, config.seed + step):
            tokens.append(token)
            yield
        text = tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))
        if self.ranks.is_main:
            path = Path(config.output_dir) / "samples" / f"step_{step:08d}.txt"
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        return text


def _open_hellaswag(config: Config, ranks: Ranks, tokenizer: Tokenizer) -> hellaswag.Questions:
    """Returns HellaSwag's questions in both styles. Rank 0 finds or downloads the examples for all ranks."""

    def read() -> list[Example]:
        source = find_source(config.hellaswag_data, DEFAULT_OUTPUT, "hellaswag_data")
        return hellaswag.read_examples(source, config.hellaswag_limit)

    return hellaswag.make_questions(ranks.on_main(read), text_encoder(tokenizer))


def run_interruptible(
    name: str,
    work: Generator[Any, None, T],
    model: ParallelModel,
    ranks: Ranks,
    stop: StopRequest,
    context: Callable[[], AbstractContextManager[Any]],
) -> T | None:
    """Runs `work` without gradients, in evaluation mode and within `context()`; returns its value.

    `work` must yield before every forward pass, and equally often on every rank. Reading and packing data comes before
    the yield, so that a rank that fails there does so before the others enter a collective. At each yield the ranks
    agree: if one was asked to stop, all raise Interrupted; if one failed, the failure is reported and all return None.

    If some ranks fail within the forward pass of a sharded model, the others wait for their weights, and the watchdog
    ends the run after --step_timeout_minutes. The checkpoint was saved before.
    """
    error: Exception | None = None
    value: list[T] = []
    model.gpt.eval()
    try:
        while True:
            interrupted, failed = ranks.any(stop.requested(), error is not None)
            if failed:
                _report_failure(name, error, ranks)
                return None
            if value:
                return value[0]
            if interrupted:
                raise Interrupted
            watchdog.progress(name)
            try:
                with torch.no_grad(), context():
                    next(work)
            except StopIteration as end:
                value = [end.value]
            except Exception as e:  # training does not depend on it, whatever it is
                error = e
    finally:
        work.close()
        model.gpt.train()
        reshard(model.gpt)


def _report_failure(name: str, error: Exception | None, ranks: Ranks) -> None:
    """Prints one warning on rank 0, and the traceback on each rank that failed, unless the disk was at fault."""
    if error is not None and not (isinstance(error, OSError) and storage_error(error)):
        traceback.print_exception(error)
    errors = ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
    if ranks.is_main:
        rank, problem = next((r, p) for r, p in enumerate(errors) if p is not None)
        where = f" on rank {rank}" if ranks.world_size > 1 else ""
        print(f"warning: {name} failed{where} and is skipped: {problem}", file=sys.stderr, flush=True)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
