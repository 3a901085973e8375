"""The chunked loss against the plain one: value, gradients, ignored targets, memory."""

import pytest
import torch
import torch.nn.functional as F

from model import loss as loss_module
from model.loss import IGNORE_INDEX, linear_cross_entropy, token_losses

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
def test_each_token_has_its_loss_and_whether_it_is_the_likeliest(softcap):
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
        weight[VOCAB:] = 100.0  # would dominate if it counted
    loss, _ = linear_cross_entropy(hidden, weight, targets, VOCAB)
    assert loss.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-6)
    loss.backward()
    assert weight.grad[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("ignored", [0, 9, ROWS])
@pytest.mark.parametrize("chunk_rows", [None, 10])
def test_bfloat16_gives_the_gradients_of_cross_entropy_within_its_rounding(ignored, chunk_rows):
    """In rows of ignored targets the hidden state is large: a leak into the weight's gradient would show."""
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
    original = loss_module.chunk_loss_and_grad
    monkeypatch.setattr(
        loss_module,
        "chunk_loss_and_grad",
        lambda logits, *rest: (shapes.append(logits.shape), original(logits, *rest))[1],
    )
    monkeypatch.setattr(loss_module, "_compiled_chunk", None)
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden, weight, targets, VOCAB)[0].backward()
    assert {shape[0] for shape in shapes} == {4, 1} and sum(shape[0] for shape in shapes) == ROWS


def test_the_gradients_are_handed_out_once():
    hidden, weight, targets = inputs()
    loss, _ = linear_cross_entropy(hidden, weight, targets, VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()
