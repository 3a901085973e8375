"""`python failing_evaluation.py --flags`: train_gpt.py where each evaluation fails in another way.

First only rank 1 cannot collate its batch of HellaSwag. From step 4 on every rank fails inside the model.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.loader import Prefetcher
from eval import scoring
from model.gpt import Block

collated = forwards = step = 0


def get_batch(self, index):
    global step
    step = index
    return original_get(self, index)


def collate_or_fail(*args):
    global collated
    collated += 1
    if collated == 1 and os.environ["RANK"] == "1":
        raise OSError("the disk is gone")
    return original_collate(*args)


def compute_or_fail(self, *args):
    global forwards
    if not torch.is_grad_enabled() and step >= 4:
        forwards += 1
        if forwards % 2 == 0:  # in the second block, when the first block of a sharded model is gathered
            raise RuntimeError("a kernel failed")
    return original_residual(self, *args)


original_get, Prefetcher.get = Prefetcher.get, get_batch
original_collate, scoring.collate = scoring.collate, collate_or_fail
original_residual, Block.residual = Block.residual, compute_or_fail
runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
