"""Train a GPT.

    python train_gpt.py --cfg=shakespeare
    torchrun --standalone --nproc_per_node=8 train_gpt.py --cfg=gpt2-124m --zero_stage=2

Start reading at `train`: ranks, data, output directory, model, resume, loop. `--help` lists the flags; cfg/ holds the
presets. Steps are numbered from 1. Step k is the k-th optimizer step, skipped ones included, and checkpoint k holds the
weights after it.
"""

from train.startup import read_config

if __name__ == "__main__":
    config = read_config()  # before torch is imported, so that --help and typos are answered at once

import math
import time

STARTED = time.monotonic()  # --max_minutes counts from here

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfg.config import Config, to_yaml
from data.documents import document_positions
from data.loader import Prefetcher, inputs_and_targets
from data.open import open_train_data
from train import checkpoint, evaluate, inputs, interrupt, optim, parallel, rank_log, run_dir, stability, watchdog
from train.memory import choose_batch_size
from train.metrics import Metrics, StepResult
from train.run_facts import add_start
from train.summary import print_banner, print_summary
from util.errors import run_command
from util.ranks import Ranks, close_ranks, init_ranks

EXIT_CODES = {"done": 0, "out of time": 0, "stopped": 4}  # util/errors.py has the exit codes of errors


def train(config: Config) -> int:
    """Runs the whole training and returns the exit code."""

    # --- ranks and device ------------------------------------------------------------------------------------------
    output_dir = Path(config.output_dir)
    sharded = config.zero_stage >= 2  # FSDP needs a process group even for one rank
    ranks = init_ranks(config.device, config.start_timeout_minutes, sharded, logs=output_dir / "logs")
    if config.batch_size == 0:
        config = choose_batch_size(config, ranks)  # from the free GPU memory
    parallel.set_math_mode(config, ranks.device)  # TF32, deterministic kernels

    # --- inputs: data, tokenizer and pretrained weights are checked before the output directory is locked -----------
    tokenizer = inputs.open_tokenizer(config, ranks)  # None if the shards' tokenizer is unknown
    # If --doc_mask is set, open_tokenizer returns a tokenizer or raises an error.
    end_of_text = tokenizer.end_of_text if config.doc_mask and tokenizer else None
    train_data = open_train_data(config, inputs.tokenizer_fingerprint(config, tokenizer))
    config = inputs.count_iterations(config, train_data, ranks)  # from --num_epochs
    evaluator = evaluate.Evaluator(config, ranks, tokenizer)  # validation, HellaSwag, samples
    # Without --init_from both are None, and the weights are random. Only LoRA has a base.
    pretrained, base = inputs.load_pretrained(config, ranks)

    # --- output directory: one run at a time; each rank has a log; the watchdog finds ranks that hang ---------------
    ranks.on_main(lambda: run_dir.lock_output_dir(output_dir))
    run_dir.check_shared(output_dir, ranks)  # all nodes see the same folder
    ranks.on_all(lambda: rank_log.keep_log(output_dir, ranks))
    watchdog.start(ranks, config.start_timeout_minutes)
    if config.record_memory:
        rank_log.record_memory(ranks.device)

    # --- model and optimizer ---------------------------------------------------------------------------------------
    model = parallel.parallelize(config, ranks, pretrained)  # activation checkpointing → compile → DDP or FSDP
    model.set_timeout(config.start_timeout_minutes)  # FSDP creates its process groups with torch's default timeout
    optimizer = optim.make_optimizer(model.gpt, config, ranks.world_size)
    scaler = stability.LossScaler(config)
    guard = stability.SpikeGuard(config)
    metrics = Metrics(config, ranks, model.gpt.flops_per_token(config.sequence_length))
    print_banner(config, ranks, model, optimizer, train_data, evaluator.val_data)

    # --- resume ----------------------------------------------------------------------------------------------------
    checkpointer = checkpoint.Checkpointer(
        config, ranks, model, optimizer, scaler, guard, metrics, train_data, tokenizer, base
    )
    step, last_record = checkpointer.resume()  # (0, {}) without a checkpoint
    ranks.on_main(lambda: run_dir.write_config(output_dir, to_yaml(config)))
    ranks.on_main(lambda: add_start(output_dir, step, ranks, model, config.sequence_length))
    model.check_replicas()  # raises if copies of a parameter differ between ranks
    model.warm_up()  # arranges DDP's buckets now, so that a resume does not change the order in which it sums
    metrics.start(step, last_record.get("elapsed_s", 0.0))
    stop = interrupt.StopRequest(config.max_minutes, STARTED, output_dir)  # signals, or out of time
    # `pending` is the record of a step that is not yet evaluated and logged, or None. After a resume it is the
    # checkpoint's record, if metrics.jsonl lacks that step.
    pending = last_record if step and not metrics.has(step) else None

    # --- the training loop -----------------------------------------------------------------------------------------
    first_step = step + 1
    stopping = False
    batches = Prefetcher(
        lambda n: inputs_and_targets(train_data, 1 if config.overfit_single_batch else n, ranks.rank, ranks.world_size),
        pin=ranks.device.type == "cuda",
    )
    with checkpointer:  # if training fails, waits until a save in the background is complete
        while True:
            # 1. Finish the previous step: run the evaluations that are due after it, and log its record. If a
            #    checkpoint was due, part 4 has saved it, so it is not lost if the run crashes now. When stopping with
            #    an evaluation due, leave the record pending; the next start evaluates and logs it.
            if pending and not (stopping and evaluator.due(step)):
                try:
                    pending |= evaluator.run(model, step, stop)
                except interrupt.Interrupted:  # one rank was asked to stop
                    stopping = True
                    # Without a step since the resume, the checkpoint is there already.
                    if step >= first_step and stability.all_finite(model, optimizer, ranks):
                        checkpointer.save(step, pending)
                else:
                    metrics.log(pending)
                    pending = None
                    if sample := evaluator.sample(model, step, stop):  # an interrupted sample is not repeated
                        metrics.say(f"sample: {sample}")
            if stopping or step >= config.num_iterations:
                break

            # 2. The next update. After a roll-back the data is ahead of the step by data_offset.
            step += 1
            watchdog.progress(f"step {step}")
            started = time.perf_counter()
            # Asynchronous on CUDA only: MPS may free the source before the copy ends (pytorch#189690).
            asynchronous = ranks.device.type == "cuda"
            batch = batches.get(step + guard.data_offset)
            idx, targets = (tensor.to(ranks.device, non_blocking=asynchronous) for tensor in batch)
            # Ask all ranks two questions. The answers travel with the all-reduce of train_step.
            answers = ranks.ask(stop.requested, lambda: checkpointer.failed or metrics.problem is not None)
            result = train_step(step, idx, targets, model, optimizer, scaler, guard, config, ranks, end_of_text)
            pending = metrics.record(step, result, time.perf_counter() - started)
            if step == first_step:  # compiled and warm: from now on a long wait is a hang
                watchdog.set_default_minutes(config.step_timeout_minutes)
                model.set_timeout(config.step_timeout_minutes)

            # 3. All ranks stop after the same step if one was asked to stop or could not write (a checkpoint in the
            #    background, or metrics.jsonl).
            stopping, failed = answers()
            if failed:
                watchdog.progress("shutdown", config.start_timeout_minutes)
                checkpointer.wait()  # wait and flush raise the error on all ranks
                metrics.flush()

            # 4. Roll back after too many skipped steps, or if what would be saved is not finite. Otherwise save,
            #    if due.
            save_due = stopping or evaluate.is_due(config.save_every_niter, step, config)
            problem = result.skip_reason if guard.should_roll_back() else ""
            if save_due and not problem and not stability.all_finite(model, optimizer, ranks):
                problem = "weights not finite"
            if problem:
                step = checkpointer.roll_back(pending, problem)  # logs the record too
                pending = None
            elif save_due:
                checkpointer.save(step, pending)

    # --- the end ---------------------------------------------------------------------------------------------------
    watchdog.progress("shutdown", config.start_timeout_minutes)
    batches.close()
    # Once the last step is logged the run is complete: a stop request is then ignored.
    complete = step == config.num_iterations and pending is None
    status, reason = stop.outcome(ranks) if stopping and not complete else ("done", "")
    checkpointer.close()
    metrics.close()
    ranks.on_main(lambda: run_dir.write_status(output_dir, status, step, reason))  # before a rank exits
    print_summary(config, ranks, first_step, step, guard.skipped, reason)
    close_ranks()
    return EXIT_CODES[status]


def train_step(
    step: int,
    idx: Tensor,
    targets: Tensor,
    model: parallel.ParallelModel,
    optimizer: torch.optim.Optimizer,
    scaler: stability.LossScaler,
    guard: stability.SpikeGuard,
    config: Config,
    ranks: Ranks,
    end_of_text: int | None,
) -> StepResult:
    """Makes one optimizer step. Returns its loss, gradient norm, learning rate, and why the update was skipped, or "".

    `idx` and `targets` (rows, sequence_length) are this rank's rows of the global batch. Targets that are IGNORE_INDEX
    are not counted in the loss. `end_of_text` is the token before each document, or None without --doc_mask.
    """
    # During training nothing but dropout draws from the global generator. Seeding it from seed, step and rank leaves no
    # random state to save.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))

    # Forward and backward, one micro-batch at a time. Each loss is a sum over tokens, divided by the number of tokens
    # in the global batch. After the all-reduce below, `unscale` replaces this by the number of counted tokens. So the
    # gradient is the same (without dropout) for any number of ranks and micro-steps.
    loss_sum, counted = torch.zeros(2, device=idx.device)
    micro_batches = list(zip(idx.long().split(config.batch_size), targets.long().split(config.batch_size), strict=True))
    for i, (micro_idx, micro_targets) in enumerate(micro_batches):
        watchdog.progress(f"step {step}")
        positions = document_positions(micro_idx, end_of_text) if end_of_text is not None else None
        model.set_gradient_sync(last=i == len(micro_batches) - 1)  # once per step, or --sync_every_microbatch
        with model.autocast():
            loss, count = model(micro_idx, micro_targets, positions)
        # DDP and FSDP average gradients over ranks, but a sum is needed: hence the world size.
        (loss * (scaler.value * ranks.world_size / config.total_batch_size)).backward()
        loss_sum += loss.detach()
        counted += count

    # One all-reduce of each rank's share: every rank gets the same numbers, and takes the same branch below.
    total, tokens, squared_norm = ranks.sum(loss_sum, counted, model.squared_grad_norm_share())
    # Makes the gradient that of the mean over counted tokens, without the loss scale.
    unscale = config.total_batch_size / max(tokens, 1) / scaler.value
    mean_loss, grad_norm = total / tokens if tokens else math.nan, math.sqrt(squared_norm) * unscale

    # Clip and update, unless loss or gradient is not finite or the norm is a spike. With a loss scale (fp16) gradients
    # are expected to overflow now and then; this does not count towards a roll-back.
    optim.set_schedules(optimizer, step, config)
    if tokens:
        skip_reason = guard.reason_to_skip(mean_loss, grad_norm, overflow_expected=scaler.value > 1)
        scaler.update(mean_loss, grad_norm)
    else:
        skip_reason, guard.skipped = "no counted tokens in the batch", guard.skipped + 1
    if not skip_reason:
        clip = min(1.0, config.grad_clip / (grad_norm + 1e-6)) if config.grad_clip else 1.0
        model.scale_gradients(clip * unscale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean_loss, grad_norm, optimizer.param_groups[0]["lr"], skip_reason)


def main(config: Config) -> int:
    """Trains; an error is also written to status.json."""
    output_dir = Path(config.output_dir)
    run_dir.refuse_restart_after_divergence(output_dir)
    interrupt.end_on_ctrl_c(output_dir)  # until train() makes its StopRequest
    with run_dir.status_on_error(output_dir):
        try:
            return train(config)
        except torch.OutOfMemoryError as error:
            raise rank_log.out_of_memory(error) from error


if __name__ == "__main__":
    run_command(lambda: main(config), teardown=False)  # an ordinary exit can crash or hang in gloo's threads
