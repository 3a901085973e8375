"""Scoring and generation, compared with a plain forward pass for each continuation or token."""

import pytest
import torch
import torch.nn.functional as F

from eval.generate import Sampling, generate
from eval.model import in_dtype
from eval.scoring import Request, ScoringModel, gpt_forward, score_requests
from tests.gpu.conftest import FAMILIES
from train.parallel import parallelize
from util.ranks import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("family", FAMILIES)]
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}  # of the relative difference


def make_model(config):
    return parallelize(config, Ranks(0, 0, 1, torch.device(config.device))).gpt.eval()


@pytest.mark.parametrize("dtype", LIMITS)
def test_continuations_scored_in_one_masked_row_have_the_losses_of_each_alone(bench, figures, family, dtype):
    generator = torch.Generator().manual_seed(0)
    config = bench.config(*FAMILIES[family].split(), f"--dtype={dtype}")
    model, device, kind = make_model(config), torch.device(bench.device), getattr(torch, dtype)

    def random_ids():
        n = int(torch.randint(1, config.n_positions // 2 + 1, (), generator=generator))
        return torch.randint(config.vocab_size, (n,), generator=generator).tolist()

    requests = [Request(random_ids(), [random_ids() for _ in range(4)]) for _ in range(20)]
    forward = in_dtype(gpt_forward(model), device, kind)
    scored = score_requests(ScoringModel(forward, Ranks(0, 0, 1, device), config.n_positions, 4096), requests)
    worst = 0.0
    for request, scores in zip(requests, scored, strict=True):
        for continuation, found in zip(request.continuations, scores, strict=True):
            text = torch.tensor([request.context + continuation], device=device)
            with torch.no_grad(), torch.autocast(device.type, dtype=kind, enabled=dtype != "float32"):
                logits = model(text[:, :-1])[0, -len(continuation) :].float()
            loss = F.cross_entropy(logits, text[0, -len(continuation) :], reduction="sum").item()
            worst = max(worst, abs(found.loss / loss - 1))
    figures({"relative difference": worst}, at_most=LIMITS[dtype])


def test_greedy_tokens_with_the_cache_are_those_of_a_forward_pass_for_each_token(bench, figures, family):
    """The texts grow beyond the model's context length."""
    config = bench.config(*FAMILIES[family].split())
    model, limit = make_model(config), config.n_positions
    prompts = [[7], list(range(limit // 2)), list(range(limit - 4))]
    found = [list(row) for row in zip(*generate(model, prompts, 12, Sampling(temperature=0)), strict=True)]
    differing = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        for i, token in enumerate(tokens):
            seen = torch.tensor([(prompt + tokens[:i])[-limit:]], device=bench.device)
            with torch.no_grad():
                differing += int(model(seen)[0, -1].argmax()) != token
    figures({"tokens that differ": differing}, at_most=0)
