"""The chunked loss against the plain one: value, gradients, ignored targets, memory."""

import math
import re

import pytest
import torch
import torch._inductor.config
import torch._inductor.ir
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from cfg.config import load_config
from model import loss as loss_module
from model.gpt import GPT, init_weights
from model.loss import (
    IGNORE_INDEX,
    MOST_CAP,
    accumulates_in_fp32,
    chunk_loss_and_grad,
    chunk_rows_for,
    fused_chunk_loss_and_grad,
    linear_cross_entropy,
    token_losses,
)

VOCAB, PADDED, WIDTH, ROWS = 301, 320, 24, 37


def inputs(ignored=0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[:ignored] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden, weight, targets, softcap=0.0):
    logits = (hidden @ weight.t())[:, :VOCAB]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("ignored", [0, 9, ROWS])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 37, 100])
def test_value_and_gradients_equal_the_plain_version(softcap, ignored, chunk_rows):
    hidden, weight, targets = inputs(ignored)
    loss, count = linear_cross_entropy(hidden, weight, targets, VOCAB, softcap, chunk_rows)
    expected = plain(hidden, weight, targets, softcap)
    assert count.item() == ROWS - ignored
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    scale = 1 / max(1, count.item())
    ours = torch.autograd.grad(loss * scale, (hidden, weight))
    theirs = torch.autograd.grad(expected * scale, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_without_gradients_the_value_is_the_same(softcap):
    hidden, weight, targets = inputs(ignored=3)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, VOCAB, softcap, chunk_rows=8)[0]
    assert without.item() == pytest.approx(plain(hidden, weight, targets, softcap).item())
    assert not without.requires_grad


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_token_losses_are_the_plain_ones_with_the_likeliest_tokens(softcap):
    hidden, weight, targets = (t.detach() for t in inputs(ignored=3))
    logits = (hidden @ weight.t())[:, :VOCAB]
    targets[5:15] = logits[5:15].argmax(-1)
    losses, likeliest = token_losses(hidden, weight, targets, VOCAB, softcap, chunk_rows=8)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert likeliest.tolist() == (logits.argmax(-1) == targets).tolist()


def test_of_equally_likely_tokens_the_first_is_the_likeliest():
    hidden, weight = torch.ones(2, WIDTH), torch.zeros(PADDED, WIDTH)
    weight[[7, 9]] = 1.0
    assert token_losses(hidden, weight, torch.tensor([7, 9]), VOCAB)[1].tolist() == [True, False]


def test_padding_rows_get_no_gradient_and_no_probability():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        weight[VOCAB:] = 100.0  # would dominate if it were not masked
    loss, _ = linear_cross_entropy(hidden, weight, targets, VOCAB)
    assert loss.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-6)
    loss.backward()
    assert weight.grad[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("ignored", [0, 9, ROWS])
@pytest.mark.parametrize("chunk_rows", [None, 10])
def test_bfloat16_gives_the_gradients_of_cross_entropy_within_its_rounding(ignored, chunk_rows):
    """Hidden states of ignored targets are large, so that a leak into the gradient of the weight is visible."""
    hidden, weight, targets = inputs(ignored)
    with torch.no_grad():
        hidden[:ignored] *= 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_rows=chunk_rows)
    loss.backward()
    assert count.item() == ROWS - ignored
    assert weight.grad.dtype == torch.float32  # summed over chunks, so not in 16 bits
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight)]
    expected = plain(*rounded, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for ours, reference in ((hidden, rounded[0]), (weight, rounded[1])):
        assert (ours.grad - reference.grad).norm() <= 1e-2 * reference.grad.norm()
    assert not hidden.grad[:ignored].any()


def test_the_largest_tensor_is_a_chunk_of_logits(monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 4 * PADDED)
    shapes = []

    def chunk_loss(logits, *rest):
        shapes.append(logits.shape)
        return chunk_loss_and_grad(logits, *rest)

    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_loss=chunk_loss)[0].backward()
    assert {shape[0] for shape in shapes} == {4, 1} and sum(shape[0] for shape in shapes) == ROWS


def test_a_second_backward_is_an_error():
    hidden, weight, targets = inputs()
    loss, _ = linear_cross_entropy(hidden, weight, targets, VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was already called"):
        loss.backward()


# The form that is compiled


@pytest.mark.parametrize("softcap", [0.0, 5.0, MOST_CAP, 2 * MOST_CAP])
@pytest.mark.parametrize("ignored", [0, 9, ROWS])
@pytest.mark.parametrize("scale", [1, 30])  # 30: logits that reach the cap
def test_the_fused_form_gives_the_numbers_of_the_eager_form(softcap, ignored, scale):
    hidden, weight, targets = (t.detach() for t in inputs(ignored))
    logits = scale * hidden @ weight.t()
    expected, gradient = chunk_loss_and_grad(logits, targets, VOCAB, softcap)
    loss, fused = fused_chunk_loss_and_grad(logits, targets, VOCAB, softcap)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (fused - gradient).abs().max() / ROWS < 2e-7
    assert not fused[:, VOCAB:].any()


def test_a_cap_far_above_all_logits_does_not_underflow():
    """exp(logit - 1000) is 0 in fp32, so the maximum of the logits is subtracted instead of the cap."""
    logits, targets = torch.zeros(2, PADDED), torch.tensor([0, 1])
    loss, gradient = fused_chunk_loss_and_grad(logits, targets, VOCAB, 1000.0)
    assert loss.item() == pytest.approx(2 * torch.tensor(float(VOCAB)).log().item()) and gradient.isfinite().all()


@pytest.fixture(scope="module")
def compiled_chunk():
    torch._dynamo.reset()
    return torch.compile(fused_chunk_loss_and_grad, dynamic=False)


SHAPE = "--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=301 --sequence_length=16 --batch_size=3 --dtype=float32"


@pytest.mark.parametrize("flags", ["", "--tie_embeddings=0 --logit_softcap=5"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_learns_the_same_from_the_chunked_and_from_the_plain_loss(flags, compiled, compiled_chunk, monkeypatch):
    """Tied and untied head, padded vocabulary, softcap, ignored targets; several chunks, the last one shorter."""
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 32 * PADDED)
    config = load_config([*SHAPE.split(), *flags.split()], world_size=1)
    model = GPT(config)
    if compiled:
        model.chunk_loss = compiled_chunk
    init_weights(model, 0)
    tokens = torch.randint(config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, ::5] = IGNORE_INDEX
    found = []
    for chunked in (True, False):
        model.zero_grad()
        if chunked:
            total, count = model(idx, targets)
        else:
            logits = model(idx).flatten(0, 1)  # without padding, capped
            total, count = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX), count
        (total / count).backward()
        found.append([(total / count).detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [15.0, 0.0, 2 * MOST_CAP])
def test_the_compiled_loss_has_no_fp32_tensor_of_the_size_of_the_logits(softcap, monkeypatch):
    """Checks Inductor's code. A scatter would make it store the fp32 gradient, so the fused form has none.

    On CPUs alone Inductor stores a tanh that is used twice, so the test lets it decide as it does on GPUs.
    """
    monkeypatch.setattr("torch._inductor.ir.is_cpu", lambda node: False)
    logits = torch.randn(64, 1024).bfloat16()
    targets = torch.randint(1000, (64,))
    expected, gradient = chunk_loss_and_grad(logits, targets, 1000, softcap)
    largest = {}
    for chunk in (fused_chunk_loss_and_grad, chunk_loss_and_grad):
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            compiled = torch.compile(chunk, dynamic=False)
            (loss, found), code = run_and_get_code(compiled, logits, targets, 1000, softcap)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert found.dtype == torch.bfloat16 and torch.allclose(found, gradient, rtol=1e-2, atol=1e-6)
        buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\), .*?, torch\.float32\)", "".join(code))
        largest[chunk] = max(math.prod(int(n) for n in sizes.split(",") if n.strip()) for sizes in buffers)
    assert largest[fused_chunk_loss_and_grad] <= logits.size(0) < logits.numel() <= largest[chunk_loss_and_grad]


@pytest.mark.parametrize("gigabytes, rows", [(141, 16384), (80, 16384), (24, 4096), (15.8, 4096)])
def test_a_chunk_takes_a_small_part_of_the_memory(gigabytes, rows):
    assert chunk_rows_for(50304, "cuda", gigabytes * 1e9) == rows
    assert rows * 50304 * 24 < 0.4 * gigabytes * 1e9  # bytes per logit, eager with a softcap


def test_a_device_that_cannot_multiply_into_an_fp32_sum_is_detected():
    assert not accumulates_in_fp32(torch.device("cpu"), torch.bfloat16)
