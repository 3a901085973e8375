"""Train a GPT: `python train_gpt.py --flags`, or `torchrun --standalone --nproc_per_node=N train_gpt.py --flags`.

The run is told here from top to bottom: configuration, ranks, data, model, strategy, optimizer,
resume, loop. `--help` lists the flags; cfg/ holds presets (`--cfg=shakespeare`). Steps count from 1:
step k is the k-th update of the weights, and checkpoint k holds the weights after it.
"""

from util.launcher import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # first of all: torch takes seconds to import, in which the launcher may be killed

from cfg.config import Config, load_config, to_yaml
from model.formats.pretrained import open_pretrained
from util.errors import DivergedError, UserError, one_line_errors, run_command

if __name__ == "__main__":
    with one_line_errors():
        config = load_config(
            describe=open_pretrained
        )  # before torch is imported, so that --help and mistakes are answered at once

import math
import os
import time

STARTED = time.monotonic()  # --max_minutes count from here
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.documents import document_positions
from data.hellaswag import DEFAULT_OUTPUT, Example, find_source
from data.loader import Loader, Prefetcher, check_same_data
from data.mixed_loader import MixedLoader
from data.open import open_train_data, open_val_data
from data.shards import Shard
from data.tokenizers.tokenizer import NAMED_IDENTITIES, NAMES, Tokenizer, check_same_tokenizer, load_tokenizer
from data.tokenizers.transfer import token_rows
from eval import hellaswag
from eval.generate import Sampling, generate
from eval.reference import GPT2_ACC_NORM
from eval.scoring import follow_on, gpt_forward, merge, score
from eval.validation import fixed_windows, summarize, windows_loss
from model.formats.checkpoint import read_state
from model.formats.pretrained import initial_values, newest_checkpoint, open_weights
from model.gpt import GPT, InitialValue
from train import checkpoint, guard, watchdog
from train.evaluate import aside
from train.memory import choose_batch_size
from train.metrics import Metrics, plot, plot_losses, read_records
from train.optim import make_optimizer, named_states, set_learning_rate
from train.parallel import (
    Parallel,
    differing_replica,
    norm_squared,
    parallelize,
    scale_gradients,
    settle,
    sync_gradients,
)
from train.rank_log import dump_memory, keep_log, record_memory
from train.scaling import LossScale
from train.schedule import learning_rate
from train.stability import StepGuard, all_finite
from util.device import device_name, peak_memory
from util.gpus import peak_flops
from util.ranks import Ranks, close_ranks, init_ranks, set_timeout

SAMPLING = Sampling(temperature=0.8, top_k=50)
EXIT_STOPPED = 4  # a signal ended the run early, and the checkpoint to go on from is written


@dataclass
class Run:
    """What a run is made of, handed from one chapter to the next."""

    config: Config
    ranks: Ranks
    train_data: Loader | MixedLoader
    val_data: Loader | None
    tokenizer: Tokenizer | None
    tokenizer_identity: dict[str, Any]  # name, size and hash: what shards and checkpoints are compared with
    end_of_text: int | None  # the token that documents begin with; None without --doc_mask
    hellaswag: hellaswag.Asked | None  # None without --hellaswag_every
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    scale: LossScale
    guard: StepGuard
    saver: checkpoint.Saver
    origin: str = "auto"  # what to go back to without a checkpoint of its own: where it began from, if anywhere

    @property
    def model(self) -> GPT:
        """What names the parameters, evaluates and samples; `parallel.train_model` trains."""
        return self.parallel.model

    def autocast(self) -> AbstractContextManager[None]:
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Autocast without the compiler, to which each length of text is a shape of its own."""
        with torch.compiler.set_stance("force_eager"), self.autocast():
            yield


def setup(config: Config) -> Run:
    """Ranks, data, model, strategy, optimizer. What is wrong with the files is known before anything is written."""
    output_dir = Path(config.output_dir)
    ranks = init_ranks(config.device, config.start_timeout_minutes, config.zero_stage >= 2, output_dir / "logs")
    device = ranks.device
    if not config.batch_size:
        config = choose_batch_size(config, ranks)
    if config.tensorcores and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        # Not warn_only: memory-efficient attention, which fp32 uses, would then warn and stay as it is.
        torch.use_deterministic_algorithms(True)

    tokenizer = open_tokenizer(config, ranks)
    identity = tokenizer.identity if tokenizer else NAMED_IDENTITIES.get(config.tokenizer, {"name": "none"})
    train_data = open_train_data(config, identity)
    val_data = open_val_data(config, identity) if config.input_val_bin else None
    end_of_text = tokenizer.end_of_text if config.doc_mask and tokenizer else None
    asked = open_hellaswag(config, ranks, tokenizer) if config.hellaswag_every and tokenizer else None
    weights = first_weights(config, ranks)
    ranks.on_main(lambda: guard.claim_output_dir(output_dir))
    guard.check_shared(output_dir, ranks)
    ranks.on_all(lambda: keep_log(output_dir, ranks))
    watchdog.start(ranks)
    watchdog.usual_minutes = config.start_timeout_minutes
    watchdog.at("the start")
    if config.record_memory and device.type == "cuda":
        record_memory()

    parallel = parallelize(config, ranks, weights)
    set_timeout(config.start_timeout_minutes, parallel.groups)  # those of --replicas have one of their own
    optimizer, line = make_optimizer(parallel.model, config, ranks.world_size)
    saver = checkpoint.Saver(config, ranks)
    data = (train_data, val_data, tokenizer, identity, end_of_text, asked)
    scale, steps = LossScale(config.dtype == "float16"), StepGuard(config)
    run = Run(config, ranks, *data, parallel, optimizer, scale, steps, saver)
    if ranks.is_main:
        announce(run, line)
    return run


def first_weights(config: Config, ranks: Ranks) -> InitialValue | None:
    """The weights of the model that --init_from names, with the embeddings of --tokenizer if asked; None: random."""
    if config.init_from == "scratch":
        return None
    origin, rows = open_pretrained(config.init_from), None
    if not origin.kind:  # a run of ours, which may go on meanwhile: rank 0 chooses the checkpoint for all
        run_dir = origin.path
        origin = replace(origin, path=ranks.on_main(lambda: newest_checkpoint(run_dir)))
    if config.resize_embeddings:
        sizes = origin.flags["vocab_size"], config.vocab_size
        old, new = load_tokenizer(origin.tokenizer, sizes[0]), load_tokenizer(config.tokenizer, sizes[1])
        rows = token_rows(old, new, *sizes)
    return initial_values(open_weights(origin), config, rows)


def announce(run: Run, optimizer_line: str) -> None:
    """The first lines of a run: what trains on what, and what may be a mistake."""
    config, ranks, data = run.config, run.ranks, run.train_data
    micro_steps = config.total_batch_size // (config.batch_size * config.sequence_length * ranks.world_size)
    origin = "" if config.init_from == "scratch" else f" of {config.init_from}"
    print(
        f"{run.model.num_params():,} parameters{origin}, {config.dtype},"
        f" {ranks.world_size} × {device_name(ranks.device)}{run.parallel.describe(config)}\n"
        f"{sum(shard.count for shard in data.shards):,} training tokens; {config.total_batch_size:,} a step ="
        f" {config.batch_size} × {config.sequence_length} × {ranks.world_size} ranks × {micro_steps} micro-steps\n"
        f"{optimizer_line}"
    )
    if isinstance(data, MixedLoader):
        print(data.describe(config.num_iterations))
    for warning in warnings(config, ranks.device, data.shards, run.val_data.shards if run.val_data else []):
        print(f"warning: {warning}")


def warnings(config: Config, device: torch.device, train: list[Shard], val: list[Shard]) -> list[str]:
    """What is allowed but rarely meant."""
    found = []
    if config.warmup_iters >= config.num_iterations and config.warmup_iters:
        found.append(
            f"--warmup_iters={config.warmup_iters} is not over within --num_iterations={config.num_iterations}"
        )
    if config.dtype == "float16" and device.type == "cpu":
        found.append("float16 on a CPU is slow, and there to try out what a GPU does; float32 is faster")
    if both := {s.path.resolve() for s in train} & {s.path.resolve() for s in val}:
        found.append(f"{min(both)} is trained on and validated on")
    if config.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        found.append("this GPU only emulates bfloat16; --dtype=float16 is faster")
    return found


def open_tokenizer(config: Config, ranks: Ranks) -> Tokenizer | None:
    """The tokenizer, which samples, bits per byte, HellaSwag and --doc_mask need.

    None for --tokenizer=none; for gpt2, the default, also where nothing needs it, or, with a word about it, if it
    cannot be had or is not that of the vocabulary. With any other, for HellaSwag or --doc_mask, that is an error.
    """
    is_default = config.tokenizer == "gpt2" and not (config.doc_mask or config.hellaswag_every)
    if config.tokenizer == "none" or (is_default and not (config.sample_every or config.input_val_bin)):
        return None
    if config.tokenizer not in NAMES:
        return load_tokenizer(config.tokenizer, config.vocab_size)  # a file that is here, or a mistake

    def first() -> str:  # one rank fetches it, the others then find it in the cache
        try:
            load_tokenizer(config.tokenizer, config.vocab_size)
            return ""
        except UserError as error:
            if not is_default:
                raise
            return str(error)

    if problem := ranks.on_main(first):
        if ranks.is_main:
            print(f"no bits per byte, and samples as token ids: {problem}")
        return None
    return load_tokenizer(config.tokenizer, config.vocab_size)


def open_hellaswag(config: Config, ranks: Ranks, tokenizer: Tokenizer) -> hellaswag.Asked:
    """The examples, which rank 0 finds or fetches for all, as both scorings ask them."""

    def read() -> list[Example]:
        source = find_source(config.hellaswag_data, DEFAULT_OUTPUT, "hellaswag_data")
        return hellaswag.read_examples(source, config.hellaswag_limit)

    how = (tokenizer.encode_whole, follow_on(tokenizer.encode), tokenizer.before_text[0])
    return hellaswag.questions(ranks.on_main(read), *how)


def resume(run: Run, choice: str) -> dict[str, Any]:
    """Loads the checkpoint to go on from and returns its state; that of an untrained model if there is none.

    `choice` is as in --resume.
    """
    config, output_dir = run.config, Path(run.config.output_dir)
    path = run.ranks.on_main(lambda: checkpoint.choose(output_dir, choice))
    if path is None:
        return {"step": 0, "wandb_id": None, "record": {"elapsed_s": 0.0}}

    def restore() -> tuple[dict[str, Any], list[str]]:
        state = read_state(path)
        check_same_data(state["data"], run.train_data.identity)
        check_same_tokenizer(state.get("tokenizer", {"name": "none"}), run.tokenizer_identity)
        changes = checkpoint.check_same_model(path, config)
        checkpoint.load(path, run.model, run.optimizer)
        return state, changes

    state, changes = run.ranks.on_all(restore)
    if run.tokenizer_identity["name"] == "none":  # not looked at now, but not to be forgotten
        run.tokenizer_identity = state.get("tokenizer", run.tokenizer_identity)
    run.scale.load_state_dict(state["scaler"])
    run.guard.load_state_dict(state.get("guard", {}))
    if path.resolve().parent.parent != output_dir.resolve():
        state["wandb_id"] = None  # a branch of another run is a run of its own
        run.origin = str(path)
    if run.ranks.is_main:
        print(f"resuming from {path}" + (f" with {', '.join(changes)}" if changes else ""))
    return state


def roll_back(run: Run, metrics: Metrics, record: dict[str, Any], why: str) -> int:
    """Returns to the last good checkpoint, and its step; the data since then is passed over.

    Raises DivergedError if there is none, or if that has been done --max_rollbacks times.
    """
    config, step, before = run.config, record["step"], run.guard.state_dict()
    watchdog.at(f"going back from step {step}", config.start_timeout_minutes)
    metrics.log(record)  # which going back cuts off again, but keeps in logs/
    run.saver.wait()
    state = resume(run, run.origin)
    run.guard.load_state_dict(before)
    run.guard.go_back(step, state["step"], state.get("guard", {}))
    advice = "lower --learning_rate" + (", or raise --skip_spikes" if config.skip_spikes else "")
    if not state["step"]:
        raise DivergedError(f"diverged: {why} in step {step}, and no checkpoint yet to go back to; {advice}")
    if run.guard.rollbacks > config.max_rollbacks:
        again = f"and going back to step {state['step']} ({config.max_rollbacks} times, --max_rollbacks) did not help"
        raise DivergedError(f"diverged: {why} in step {step}, {again}; {advice}")
    metrics.go_back(state["step"])
    metrics.say(f"{why} in step {step}: back to step {state['step']}, and past the data that led from there to here")
    return int(state["step"])


def train_step(run: Run, step: int, batch: Tensor, votes: list[float]) -> tuple[float, float, str, list[float]]:
    """One update from `batch` (rows, T + 1), this rank's part of the global batch.

    Micro-batch losses are sums, divided by the tokens of the whole global batch; gradients are averaged over
    ranks, hence the world_size. Returns the mean loss over the global batch, the gradient norm before
    clipping, why the step was not taken ("" if it was), and the `votes` summed over ranks.
    """
    config, ranks, parallel = run.config, run.ranks, run.parallel
    # Dropout is all that draws from the global generator: seeded per step and rank, it leaves nothing to save.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))
    loss_sum = torch.zeros((), device=batch.device)
    micro_batches = batch.split(config.batch_size)
    for i, micro_batch in enumerate(micro_batches):
        watchdog.at(f"step {step}")
        idx, targets = micro_batch[:, :-1], micro_batch[:, 1:]
        positions = document_positions(idx, run.end_of_text) if run.end_of_text is not None else None
        sync_gradients(parallel, config, last=i == len(micro_batches) - 1)
        with run.autocast():
            loss, _ = parallel.train_model(idx, targets, positions=positions)
        (loss * (run.scale.value * ranks.world_size / config.total_batch_size)).backward()
        loss_sum += loss.detach()

    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    squared = norm_squared(gradients, parallel.mesh, ranks.world_size).to(batch.device)
    # One reduction brings loss and norm together and lets all ranks stop on the same step.
    total, squared_norm, *votes = ranks.sum(torch.stack((loss_sum, squared, *loss_sum.new_tensor(votes)))).tolist()
    mean_loss, norm = total / config.total_batch_size, math.sqrt(squared_norm) / run.scale.value
    # Both numbers are the same on all ranks, so all take the same branch.
    refusal = run.guard.refusal(mean_loss, norm, overflow_expected=run.scale.value > 1)
    set_learning_rate(run.optimizer, learning_rate(step, config.num_iterations, config))
    if not refusal:
        clipped = min(1.0, config.grad_clip / (norm + 1e-6)) if config.grad_clip else 1.0
        if (factor := clipped / run.scale.value) != 1:
            scale_gradients(gradients, factor)
        run.optimizer.step()
    run.scale.update(math.isfinite(mean_loss) and math.isfinite(norm))
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm, refusal, votes


def validate(run: Run, stop: guard.StopRequest) -> dict[str, float | None]:
    """Loss over --val_max_steps batches, the same windows of the shards on any number of ranks.

    These three evaluations find nothing ({} or "") if they fail on a rank, and raise Stopped if one is asked to stop.
    """
    config, ranks, data = run.config, run.ranks, run.val_data
    assert data is not None, "validation is due only with data for it"
    windows = fixed_windows(data.windows, config.val_max_steps * config.total_batch_size // config.sequence_length)
    bytes_of = run.tokenizer.byte_lengths(config.vocab_size) if run.tokenizer else None
    share = windows[ranks.rank :: ranks.world_size]
    rounds = -(-len(windows) // (config.batch_size * ranks.world_size))
    work = windows_loss(run.model, data, share, config.batch_size, rounds, ranks.device, bytes_of, run.end_of_text)
    sums = aside("validation", work, run.model, ranks, stop, run.autocast)
    return summarize(*ranks.sum_floats(sums)) if sums is not None else {}


def hellaswag_accuracy(run: Run, stop: guard.StopRequest) -> dict[str, float]:
    """Accuracies in both scorings, the examples split over the ranks."""
    config, ranks, asked = run.config, run.ranks, run.hellaswag
    assert asked is not None, "HellaSwag is due only with its examples"
    requests = hellaswag.requests(asked)
    tokens = max(config.batch_size * config.sequence_length, 4096)  # without gradients that is little
    split = (ranks.rank, ranks.world_size)
    work = score(gpt_forward(run.model), requests, config.n_positions, tokens, ranks.device, True, *split)
    pieces = aside("HellaSwag", work, run.model, ranks, stop, run.eager)
    if pieces is None:
        return {}
    scores = merge((piece for share in ranks.gather(pieces) for piece in share), requests)
    return hellaswag.record_of(hellaswag.accuracies(asked, scores))


def sample(run: Run, stop: guard.StopRequest, step: int) -> str:
    """Text of a new document, also written to samples/. All ranks draw it: a sharded model needs them all."""
    config, tokenizer = run.config, run.tokenizer
    begin = tokenizer.before_text if tokenizer else [0]
    prompt = [*begin, *(tokenizer.encode(config.sample_prompt) if tokenizer else [])]

    def draw() -> Generator[None, None, str]:
        tokens = prompt[len(begin) :]
        for (token,) in generate(run.model, [prompt], config.sample_tokens, SAMPLING, config.seed + step):
            tokens.append(token)
            yield
        text = tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))
        if run.ranks.is_main:
            path = Path(config.output_dir) / "samples" / f"step_{step:08d}.txt"
            path.write_text(text + "\n", encoding="utf-8", errors="replace")
        return text

    return aside("sample", draw(), run.model, run.ranks, stop, run.eager) or ""


def save(run: Run, metrics: Metrics, record: dict[str, Any]) -> None:
    """Writes the checkpoint of the step that `record` describes, which then says how long the loop waited for it."""
    watchdog.at(f"the save of step {record['step']}", run.config.start_timeout_minutes)
    metrics.flush()
    state = {
        "record": record.copy(),
        "data": run.train_data.identity,
        "scaler": run.scale.state_dict(),
        "guard": run.guard.state_dict(),
        "wandb_id": metrics.wandb_id,
        "tokenizer": run.tokenizer_identity,
    }
    files = run.tokenizer.files if run.tokenizer else {}
    record["save_s"] = run.saver.save(record["step"], run.model, run.optimizer, state, files)


def report(run: Run, metrics: Metrics, record: dict[str, Any], stop: guard.StopRequest) -> bool:
    """Evaluates what is due after a step, and logs the step. It comes after the save: a kill here loses nothing.

    False if a stop request cut it short: the step is then not logged, and the next start makes up for it.
    """
    step = record["step"]
    wanted = evaluations_due(run, step)
    try:
        if "validation" in wanted:
            record |= validate(run, stop)
        if "HellaSwag" in wanted:
            record |= hellaswag_accuracy(run, stop)
    except guard.Stopped:
        return False
    metrics.log(record)
    with suppress(guard.Stopped):  # a sample is not made up for
        if "sample" in wanted and (text := sample(run, stop, step)):
            metrics.say(f"sample: {text}")
    return True


def evaluations_due(run: Run, step: int) -> set[str]:
    """What is to be done after a step, of validation, HellaSwag and a sample."""
    config = run.config
    every = {
        "validation": (run.val_data is not None, config.val_loss_every),
        "HellaSwag": (config.hellaswag_every > 0, config.hellaswag_every),
        "sample": (config.sample_every > 0, config.sample_every),
    }
    return {what for what, (wanted, n) in every.items() if wanted and due(config, n, step)}


def due(config: Config, every: int, step: int) -> bool:
    return step == config.num_iterations or (every > 0 and step % every == 0)


def train(config: Config) -> int:
    """What comes before and after the loop. Returns the exit code."""
    run = setup(config)
    config, ranks, output_dir = run.config, run.ranks, Path(config.output_dir)
    state = resume(run, config.resume)
    ranks.on_main(lambda: checkpoint.prepare_dir(output_dir, to_yaml(config)))
    if name := differing_replica(run.parallel, ranks):
        raise RuntimeError(f"{name} is not the same on all ranks that should hold the same part of it")
    settle(run.parallel, config, ranks, run.autocast())
    metrics = Metrics(config, ranks, state["step"], state["wandb_id"])
    stop = guard.StopRequest(config.max_minutes, STARTED)
    with run.saver.whatever_happens():
        step, stopping = loop(run, metrics, stop, state)

    watchdog.at("the end", config.start_timeout_minutes)
    # A run whose last step is logged is done, whoever asked it to stop.
    stopping = stopping and not (step == config.num_iterations and ranks.on_main(lambda: metrics.has(step)))
    signalled, late = ranks.sum_floats(stop.votes()) if stopping else (0.0, 0.0)
    run.saver.close()
    metrics.close()
    reason = (stop.reason or "a signal to another rank") if signalled else "--max_minutes" if late else ""
    status = "stopped" if signalled else "out of time" if late else "done"
    ranks.on_main(lambda: guard.write_status(output_dir, status, step, reason))  # before any rank has left
    if ranks.is_main:
        summarize_run(run, state["step"], step, reason)
    close_ranks()
    return EXIT_STOPPED if signalled else 0


def loop(run: Run, metrics: Metrics, stop: guard.StopRequest, state: dict[str, Any]) -> tuple[int, bool]:
    """From the step of `state` to the last, or until all ranks agree to stop. Returns the step, and whether so."""
    config, ranks, device = run.config, run.ranks, run.ranks.device
    step = start = state["step"]
    stopping = False
    if step and not ranks.on_main(lambda: metrics.has(step)):
        stopping = not report(run, metrics, state["record"], stop)  # the last run ended before it came to this

    peak, flops_per_token = peak_flops(device_name(device)), run.model.flops_per_token(config.sequence_length)
    batches = Prefetcher(
        lambda k: run.train_data.batch(1 if config.overfit_single_batch else k, ranks.rank, ranks.world_size),
        pin=device.type == "cuda",
    )
    clock = time.perf_counter() - state["record"]["elapsed_s"]
    while step < config.num_iterations and not stopping:
        step += 1
        watchdog.at(f"step {step}")
        before = time.perf_counter()
        # Not without waiting on MPS, where the source may be freed before it is copied (pytorch#189690).
        batch = batches.get(step + run.guard.passed_over).to(device, non_blocking=device.type == "cuda").long()
        failed = float(run.saver.failed() or metrics.problem is not None)
        loss, grad_norm, refusal, (failed, *votes) = train_step(run, step, batch, [failed, *stop.votes()])
        if step == start + 1:  # compilers and disks are warm
            watchdog.usual_minutes = config.step_timeout_minutes
            set_timeout(config.step_timeout_minutes, run.parallel.groups)
        now = time.perf_counter()
        tok_per_s = config.total_batch_size / (now - before)
        record = {
            "step": step,
            "tokens": step * config.total_batch_size,
            "loss": loss,
            "lr": run.optimizer.param_groups[0]["lr"],  # as the optimizer has it; a skipped step does not use it
            "grad_norm": grad_norm,
            "tok_per_s": tok_per_s,
            "mfu": tok_per_s * flops_per_token / (peak * ranks.world_size) if peak else None,
            "elapsed_s": now - clock,
            "memory_bytes": peak_memory(device),
            **({"skipped": refusal} if refusal else {}),
        }
        if failed:
            watchdog.at("the end", config.start_timeout_minutes)
            run.saver.wait()  # these raise what went wrong, on all ranks in the same step
            metrics.flush()
        stopping = any(votes)
        saving = stopping or due(config, config.save_every_niter, step)
        why = refusal if run.guard.gives_up() else "weights not finite" if saving and not healthy(run) else ""
        if why:
            step = roll_back(run, metrics, record, why)
            continue
        if saving:
            save(run, metrics, record)
        # Whoever asks us to stop does not wait for an evaluation, nor is one begun.
        if not (stopping and evaluations_due(run, step)) and not report(run, metrics, record, stop):
            stopping = True
            save(run, metrics, record)
    batches.close()
    return step, stopping


def healthy(run: Run) -> bool:
    """Whether weights and moments are finite on all ranks: others are never saved."""
    tensors = [*run.model.parameters(), *named_states(run.optimizer, run.model).values()]
    return run.ranks.sum_floats([float(not all_finite(tensors))]) == [0.0]


def summarize_run(run: Run, start: int, step: int, reason: str) -> None:
    """The last lines: what was done, where it is, how to go on. Draws the loss curve."""
    config, output_dir = run.config, Path(run.config.output_dir)
    if reason:
        print(f"stopped by {reason} after step {step} of {config.num_iterations}; the same command goes on from there")
    elif start >= config.num_iterations:
        print(f"nothing left to do: the checkpoint is at step {start} of --num_iterations={config.num_iterations}")
    losses = [r["loss"] for r in read_records(output_dir / "metrics.jsonl") if r["loss"] is not None]
    if losses:
        skipped = f", {run.guard.skipped} not taken" if run.guard.skipped else ""
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps{skipped}")
    curve = plot_losses(output_dir)
    print(
        f"checkpoint: {output_dir / 'checkpoints' / f'step_{step:08d}'}" + (f", loss curve: {curve}" if curve else "")
    )
    if config.hellaswag_every:
        keys = {"completion": "hellaswag_acc_norm", "lm_eval": "hellaswag_lm_eval_acc_norm"}
        plot(output_dir, "hellaswag", "HellaSwag acc_norm", keys, GPT2_ACC_NORM)


def main(config: Config) -> int:
    guard.stay_diverged(Path(config.output_dir))
    with guard.mistakes_noted(Path(config.output_dir)):
        try:
            return train(config)
        except torch.OutOfMemoryError as error:
            snapshot = dump_memory()
            raise UserError(
                f"out of memory on the GPU ({str(error).split('.')[0]}); lower --batch_size, and more micro-steps"
                f" make up the same --total_batch_size; or see scripts/plan.py for what --activation_checkpointing and"
                f" --zero_stage save{snapshot}"
            ) from error


if __name__ == "__main__":
    run_command(lambda: main(config), teardown=False)
