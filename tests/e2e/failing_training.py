"""`FAIL=WHAT@FIRST-LAST python failing_training.py --flags`: train_gpt.py with bad numbers on the last rank.

The fault occurs in every step that trains on one of the batches FIRST to LAST. WHAT is one of
    loss        the loss becomes NaN
    gradient    the gradient becomes infinite
    spike       the gradient becomes a thousand times as large
    weights     a weight becomes NaN after the update
    moments     an Adam moment becomes NaN after the update
    stuck       the rank hangs, but lives
    oom         no memory for the step; writing files takes longer, so that a save is under way
SKIP_DATA=FROM+COUNT: from batch FROM on, each batch is replaced by the batch COUNT later, without any fault.
BATCHES=FILE: rank 0 appends each batch that it trains on to FILE, as a JSON line.

The faults are injected into the model, the optimizer and the data, not into train_gpt.py.
"""

import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.loader import Prefetcher
from model.gpt import GPT

what, *numbers = re.fullmatch(r"(\w+)@(\d+)-(\d+)", os.environ.get("FAIL", "nothing@0-0")).groups()
first, last = map(int, numbers)
skip_from, skipped = map(int, os.environ.get("SKIP_DATA", "0+0").split("+"))
rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
failing = False  # in this step, on this rank


def get_batch(self, index):
    global failing
    failing = rank == world_size - 1 and first <= index <= last
    if skip_from and index >= skip_from:
        index += skipped
    idx, targets = original_get(self, index)
    if rank == 0 and "BATCHES" in os.environ:
        rows = torch.cat((idx, targets[:, -1:]), dim=1)
        with open(os.environ["BATCHES"], "a") as f:
            f.write(json.dumps({"index": index, "batch": rows.tolist()}) + "\n")
    return idx, targets


def forward_or_fail(self, *args, **kwargs):
    result = original_forward(self, *args, **kwargs)
    if not (failing and torch.is_grad_enabled()):
        return result
    while what == "stuck":
        time.sleep(0.1)
    if what == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    loss, count = result
    if what == "loss":
        loss = loss * torch.nan
    if what in ("gradient", "spike"):
        factor = torch.inf if what == "gradient" else 1000.0
        loss.register_hook(lambda gradient: gradient * factor)
    return loss, count


def poison(optimizer, args, kwargs):
    if not (failing and what in ("weights", "moments")):
        return
    weight = next(p for group in optimizer.param_groups for p in group["params"])
    tensor = weight.detach() if what == "weights" else optimizer.state[weight]["exp_avg"]
    getattr(tensor, "_local_tensor", tensor).view(-1)[:1] = torch.nan


def write_slowly(fd):
    time.sleep(0.3)
    original_fsync(fd)


original_get, Prefetcher.get = Prefetcher.get, get_batch
original_forward, GPT.forward = GPT.forward, forward_or_fail
register_optimizer_step_post_hook(poison)
if what == "oom":
    original_fsync, os.fsync = os.fsync, write_slowly
runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
