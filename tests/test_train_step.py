"""The gradients that the training step gives to the optimizer."""

import pytest
import torch

from cfg.config import load_config
from scripts.bench.common import Run
from util.ranks import Ranks

FLAGS = "--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=251 --sequence_length=16 --batch_size=2 --total_batch_size=64"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("grad_clip", [0, 1000, 0.01])
def test_the_optimizer_gets_gradients_without_the_loss_scale_and_clipped_only_if_too_large(dtype, grad_clip):
    flags = [*FLAGS.split(), "--device=cpu", f"--dtype={dtype}", f"--grad_clip={grad_clip}"]
    run = Run(load_config(flags, world_size=1), Ranks(0, 0, 1, torch.device("cpu")))
    handed_over = []
    run.optimizer.step = lambda: handed_over.extend(p.grad.clone() for p in run.model.gpt.parameters())
    tokens = torch.randint(251, (4, 17), generator=torch.Generator().manual_seed(0))
    result = run.step(1, tokens)
    assert not result.skip_reason and result.grad_norm > 0.1
    expected = min(result.grad_norm, grad_clip or result.grad_norm)
    assert torch.nn.utils.get_total_norm(handed_over).item() == pytest.approx(expected, rel=1e-4)
