"""What the training step hands to the optimizer."""

import pytest
import torch

import train_gpt
from cfg.config import load_config
from scripts.bench.common import make_run
from util.ranks import Ranks

FLAGS = "--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=251 --sequence_length=16 --batch_size=2 --total_batch_size=64"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("grad_clip", [0, 1000, 0.01])
def test_the_optimizer_gets_gradients_without_the_loss_scale_and_clipped_only_if_too_large(dtype, grad_clip):
    flags = [*FLAGS.split(), "--device=cpu", f"--dtype={dtype}", f"--grad_clip={grad_clip}"]
    run = make_run(load_config(flags, world_size=1), Ranks(0, 0, 1, torch.device("cpu")))
    handed_over = []
    run.optimizer.step = lambda: handed_over.extend(p.grad.clone() for p in run.model.parameters())
    tokens = torch.randint(251, (4, 17), generator=torch.Generator().manual_seed(0))
    _, norm, refusal, _ = train_gpt.train_step(run, 1, tokens, [])
    assert not refusal and norm > 0.1
    expected = min(norm, grad_clip or norm)
    assert torch.nn.utils.get_total_norm(handed_over).item() == pytest.approx(expected, rel=1e-4)
