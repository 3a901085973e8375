"""`python failing_evaluation.py --flags`: train_gpt.py where one evaluation after the other fails, each in its way.

First rank 1 alone cannot collate its batch of HellaSwag, then, from step 4 on, every rank fails within the model.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cfg.config import load_config
from util.errors import run_command

config = load_config()

import torch

import train_gpt
from eval import scoring
from model.gpt import Block

collate, residual = scoring.collate, Block.residual
collated = forwards = steps = 0


def collate_or_fail(*args):
    global collated
    collated += 1
    if collated == 1 and os.environ["RANK"] == "1":
        raise OSError("the disk is gone")
    return collate(*args)


def compute_or_fail(self, *args):
    global forwards
    if not torch.is_grad_enabled() and steps >= 4:
        forwards += 1
        if forwards % 2 == 0:  # in the second block, when a sharded model's first is gathered
            raise RuntimeError("a kernel failed")
    return residual(self, *args)


def counted(step, *args):
    global steps
    steps = step
    return train_step(step, *args)


train_step, train_gpt.train_step = train_gpt.train_step, counted
scoring.collate, Block.residual = collate_or_fail, compute_or_fail
run_command(lambda: train_gpt.main(config), teardown=False)
