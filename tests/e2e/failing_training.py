"""`FAIL=WHAT@FIRST-LAST python failing_training.py --flags`: train_gpt.py where the last rank's numbers go wrong.

WHAT is "loss" (not a number), "gradient" (infinite), "spike" (a gradient a thousand times as large), "weights" or
"moments" (a weight, or an Adam moment, becomes NaN after the step), "stuck" (the rank hangs, but lives) or
"oom" (no memory for the step, and saves take a second longer). It happens in every step that receives the batch of one
of the steps FIRST to LAST of an undisturbed run; with "!" in front, in the steps FIRST to LAST whatever their batch.
PASS_OVER=FROM+COUNT: no failure, but from step FROM on each step is given the batch of the step COUNT later.
BATCHES=FILE: each step of rank 0 appends a JSON line with the batch that it trains on.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cfg.config import load_config
from model.formats.pretrained import open_pretrained
from util.errors import run_command

config = load_config(describe=open_pretrained)

import torch

import train_gpt
from train.checkpoint_writer import CheckpointWriter
from train.optim import named_states
from train.parallel import ParallelModel, local

always, what, *numbers = re.fullmatch(r"(!?)(\w+)@(\d+)-(\d+)", os.environ.get("FAIL", "nothing@0-0")).groups()
first, last = map(int, numbers)
start, ahead = map(int, os.environ.get("PASS_OVER", "0+0").split("+"))
is_last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
now = False
bad_batches = []
train_step, open_train_data = train_gpt.train_step, train_gpt.open_train_data
squared_grad_norm = ParallelModel.squared_grad_norm


def open_and_keep(*args):
    global train_data
    train_data = open_train_data(*args)
    return train_data


def wrong_gradients(model):
    if now and what == "gradient":
        local(model.gradients()[0]).view(-1)[:1] = torch.inf
    if now and what == "spike":
        model.scale_gradients(1000.0)
    return squared_grad_norm(model)


def batch_of(step, ranks):
    """Returns this rank's part of the batch of a step of an undisturbed run."""
    return train_data.batch(step, ranks.rank, ranks.world_size).long()


def wrong_step(step, batch, model, optimizer, *rest):
    global now
    ranks = model.ranks
    if start and step >= start:
        batch = batch_of(step + ahead, ranks)
    if what != "nothing" and not always and not bad_batches:
        bad_batches.extend(batch_of(bad_step, ranks) for bad_step in range(first, last + 1))
    now = is_last and (first <= step <= last if always else any(torch.equal(batch, bad) for bad in bad_batches))
    if ranks.is_main and "BATCHES" in os.environ:
        with open(os.environ["BATCHES"], "a") as f:
            f.write(json.dumps({"step": step, "batch": batch.tolist()}) + "\n")
    while now and what == "stuck":
        time.sleep(0.1)
    if now and what == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    hook = model.gpt.register_forward_hook(lambda *call: (call[-1][0] * (torch.nan if now else 1), call[-1][1]))
    if what != "loss":
        hook.remove()
    result = train_step(step, batch, model, optimizer, *rest)
    hook.remove()
    if now and what in ("weights", "moments"):
        moments = (t for name, t in named_states(optimizer, model.gpt).items() if name.endswith("/exp_avg"))
        with torch.no_grad():
            local(next(model.gpt.parameters() if what == "weights" else moments)).view(-1)[:1] = torch.nan
    return result


def write_slowly(*args):
    time.sleep(1)
    write(*args)


train_gpt.train_step, train_gpt.open_train_data = wrong_step, open_and_keep
ParallelModel.squared_grad_norm = wrong_gradients
if what == "oom":
    write, CheckpointWriter._write = CheckpointWriter._write, write_slowly
run_command(lambda: train_gpt.main(config), teardown=False)
