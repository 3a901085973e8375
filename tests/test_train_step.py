"""The gradients that the training step gives to the optimizer."""

import pytest
import torch

from cfg.config import load_config
from model.loss import IGNORE_INDEX
from scripts.bench.common import Run
from train_gpt import train_step
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


@pytest.fixture
def masked_step():
    """Makes one step on a batch of which some targets are not counted; returns the result, gradients and weights."""

    def step(tokens, counted, *flags):
        config = load_config([*FLAGS.split(), "--device=cpu", "--grad_clip=0", *flags], world_size=1)
        run = Run(config, Ranks(0, 0, 1, torch.device("cpu")))
        gradients = {}
        run.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in run.model.gpt.named_parameters()})
        parts = run.model, run.optimizer, run.scaler, run.guard, config, run.ranks
        targets = tokens[:, 1:].where(counted[:, 1:], IGNORE_INDEX)
        return train_step(1, tokens[:, :-1], targets, *parts, end_of_text=None), gradients, run

    return step


TOKENS = torch.randint(251, (4, 17), generator=torch.Generator().manual_seed(0))
COUNTED = torch.rand(4, 17, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.1], [0.9], [0.5], [0.0]])


def test_the_gradient_is_that_of_the_mean_over_counted_tokens(masked_step):
    result, gradients, run = masked_step(TOKENS, COUNTED)
    gpt = run.model.gpt.double()
    gpt.residual_dtype = torch.float64
    logits = gpt(TOKENS[:, :-1].long()).double()
    loss = torch.nn.functional.cross_entropy(logits[COUNTED[:, 1:]], TOKENS[:, 1:][COUNTED[:, 1:]])
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)
    names, parameters = zip(*gpt.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(gradients[name].double(), expected, rtol=1e-4, atol=1e-7, msg=name)
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


def test_targets_that_are_not_counted_do_not_change_the_gradient(masked_step):
    counted = COUNTED.clone()
    counted[:, -1] = False  # the last token is a target only
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 251
    (result, gradients, _), (same, same_gradients, _) = masked_step(TOKENS, counted), masked_step(changed, counted)
    assert result == same and gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_batch_without_counted_tokens_is_skipped_and_is_no_sign_of_divergence(masked_step, dtype):
    result, gradients, run = masked_step(TOKENS, torch.zeros_like(COUNTED), f"--dtype={dtype}")
    assert result.skip_reason == "no counted tokens in the batch" and result.loss != result.loss and not gradients
    assert run.guard.skipped == 1 and run.guard.consecutive_skips == 0 and not run.guard.norms
    assert run.scaler.good_steps == 0 and run.scaler.value in (1, 2**16)
