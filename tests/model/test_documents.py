"""Several documents in one row are computed as if each were alone."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask

from cfg.config import load_config
from model.gpt import GPT, init_weights
from train.parallel import compile_model

VOCAB, END = 301, 300
LENGTHS = ((20, 1, 43), (33, 30, 1), (64,))  # tokens of the documents in each row, with their end-of-text tokens
SMALL = ["--n_layer=2", "--n_head=4", "--n_embd=64", f"--vocab_size={VOCAB}"]
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--tie_embeddings=0", "--n_kv_head=2"]
WINDOW = [*LLAMA, "--sliding_window=7", "--head_dim=20", "--qkv_bias=1"]
FAMILIES = pytest.mark.parametrize("family", [[], LLAMA, WINDOW], ids=["gpt2", "llama", "window"])
ATTENTIONS = pytest.mark.parametrize("flash", ["--flash=0", "--flash=1"])


def make(*flags):
    config = load_config([*SMALL, f"--sequence_length={sum(LENGTHS[0])}", *flags], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():  # far from the initial values, with which attention is almost uniform
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def packed():
    """Ids, targets and positions, each (rows, 64): every document is an END and random tokens."""
    rows = torch.randint(END, (len(LENGTHS), sum(LENGTHS[0]) + 1), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    rows[:, :-1][positions == 0] = END
    rows[:, -1] = END
    return rows[:, :-1], rows[:, 1:], positions


def documents():
    """Returns (row, slice of columns) for every document."""
    for row, lengths in enumerate(LENGTHS):
        stop = 0
        for length in lengths:
            start, stop = stop, stop + length
            yield row, slice(start, stop)


def loss_and_gradients(model, *batch):
    model.zero_grad()
    loss, count = model(*batch[:2], positions=batch[2])
    (loss / count).backward()
    return (loss / count).item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@FAMILIES
@ATTENTIONS
def test_the_packed_loss_is_the_sum_over_the_documents_alone(family, flash):
    model = make(*family, flash)
    idx, targets, positions = packed()
    loss, count = model(idx, targets, positions=positions)
    alone = [model(idx[row, part][None], targets[row, part][None]) for row, part in documents()]
    assert count == sum(n for _, n in alone) == idx.numel()
    assert (loss / count).item() == pytest.approx((sum(x for x, _ in alone) / count).item(), abs=1e-5)
    without, _ = model(idx, targets)
    assert abs((loss - without) / count) > 1e-2  # the mask matters


@FAMILIES
@ATTENTIONS
def test_packed_gradients_are_the_gradients_of_the_documents_alone(family, flash):
    model = make(*family, flash)
    idx, targets, positions = packed()
    _, together = loss_and_gradients(model, idx, targets, positions)
    model.zero_grad()
    for row, part in documents():
        (model(idx[row, part][None], targets[row, part][None])[0] / idx.numel()).backward()
    assert largest_difference(together, {n: p.grad for n, p in model.named_parameters()}) < 1e-5


@FAMILIES
@ATTENTIONS
def test_no_gradient_reaches_another_document(family, flash):
    model = make(*family, flash)
    idx, targets, positions = packed()
    embeddings = []
    model.wte.register_forward_hook(lambda module, args, out: embeddings.append(out))
    losses = torch.nn.functional.cross_entropy(model(idx, positions=positions).mT, targets, reduction="none")
    for row, part in documents():
        (gradient,) = torch.autograd.grad(losses[row, part].sum(), embeddings[0], retain_graph=True)
        assert (gradient[row, part].abs().sum(-1) > 0).all()
        gradient[row, part] = 0
        assert not gradient.any()  # exactly


@FAMILIES
def test_one_document_per_row_needs_no_mask(family):
    model = make(*family)
    idx, _, _ = packed()
    positions = torch.arange(idx.size(1)).expand_as(idx)
    assert torch.allclose(model(idx, positions=positions), model(idx), atol=1e-5)


@pytest.mark.slow
@FAMILIES
def test_compiled_gives_the_same_numbers_as_eager(family):
    model = make(*family, "--compile=1")
    eager_loss, eager = loss_and_gradients(model, *packed())
    compile_model(model, model.config, torch.device("cpu"))
    compiled_loss, compiled = loss_and_gradients(model, *packed())
    assert not model.flex  # which is for CUDA
    assert abs(compiled_loss - eager_loss) < 1e-5
    assert largest_difference(compiled, eager) < 1e-5


def long_batch(cut=150):
    """A length that is not a multiple of FlexAttention's tile, with empty, mixed and full tiles."""
    rows = torch.randint(END, (2, 301), generator=torch.Generator().manual_seed(cut))
    starts = torch.tensor([[0] * cut + [cut] * (300 - cut), [0] * 290 + [290] * 10])
    return rows[:, :-1], rows[:, 1:], torch.arange(300) - starts


@FAMILIES
def test_flex_attention_gives_the_same_numbers_as_the_mask(family, monkeypatch):
    # On the CPU torch has an unfused version whose backward pass exists but is disabled by default.
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    model = make(*family, "--sequence_length=300")
    masked_loss, masked = loss_and_gradients(model, *long_batch())
    seen = []
    model.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model.flex = True
    flex_loss, flex = loss_and_gradients(model, *long_batch())
    assert isinstance(seen[0], BlockMask)
    mixed, full = seen[0].kv_num_blocks.sum(), seen[0].full_kv_num_blocks.sum()
    # A causal mask has 6 tiles per row; with a window of 7 none of them is full.
    assert (full > 0) == (not model.config.sliding_window) and mixed + full < 12
    assert abs(flex_loss - masked_loss) < 1e-5
    assert largest_difference(flex, masked) < 1e-5


def test_a_window_without_documents_is_the_same_in_every_row_of_flex_attention(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    model = make("--sequence_length=300", "--sliding_window=7")
    idx, targets, _ = long_batch()
    masked_loss, masked = loss_and_gradients(model, idx, targets, None)
    model.flex = True
    flex_loss, flex = loss_and_gradients(model, idx, targets, None)
    assert abs(flex_loss - masked_loss) < 1e-5
    assert largest_difference(flex, masked) < 1e-5


@pytest.mark.slow
def test_new_documents_do_not_break_the_graph_or_recompile_it(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    eager, model = (make(*LLAMA, "--sequence_length=300") for _ in range(2))
    model.flex = True
    for block in model.h:
        block.compile(backend=backend, fullgraph=True)
    for cut in (150, 40):
        eager_loss, expected = loss_and_gradients(eager, *long_batch(cut))
        loss, gradients = loss_and_gradients(model, *long_batch(cut))
        assert abs(loss - eager_loss) < 1e-5
        assert largest_difference(gradients, expected) < 1e-5
    assert len(graphs) == 1


def test_short_rows_do_not_use_flex_attention():
    model = make()
    seen = []
    model.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model.flex = True
    idx, _, positions = packed()
    model(idx, positions=positions)
    model(idx)
    assert isinstance(seen[0], torch.Tensor) and seen[1] is None


def test_positions_of_another_shape_are_an_error():
    idx, _, positions = packed()
    with pytest.raises(ValueError, match="positions are"):
        make()(idx, positions=positions[0])
