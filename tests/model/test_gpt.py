"""The decoder: switches, initial values, sizes and errors."""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from cfg.config import ModelConfig, load_config
from eval.generate import Sampling, generate
from model.gpt import ATTENTION, GPT, PRODUCTS, init_weights, initial_value, save_products, save_products_and_attention
from model.layers import apply_rotary, rotary_table
from model.loss import chunk_loss_and_grad
from train.parallel import compile_model
from util.errors import UserError

SMALL = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--sequence_length=48", "--vocab_size=301"]
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--tie_embeddings=0", "--n_kv_head=2"]
MODERN = ["--positions=rotary", "--norm=rmsnorm", "--mlp=relu2", "--bias=0", "--qk_norm=1", "--logit_softcap=15"]
NANOCHAT = [*MODERN, "--norm_weight=0", "--embedding_norm=1", "--tie_embeddings=0"]
FAMILIES = pytest.mark.parametrize("family", [[], LLAMA, MODERN, NANOCHAT], ids=["gpt2", "llama", "modern", "nanochat"])


def make(*flags, seed=0):
    config = load_config([*SMALL, *flags], world_size=1)
    model = GPT(config)
    init_weights(model, seed)
    return model


def batch(rows=3, length=48, vocab=301):
    tokens = torch.randint(vocab, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model):
    model.zero_grad()
    loss, count = model(*batch())
    (loss / count).backward()
    return (loss / count).item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@FAMILIES
def test_flash_and_plain_attention_give_the_same_numbers(family):
    flash, plain = make(*family, "--flash=1"), make(*family, "--flash=0")
    assert (flash(batch()[0]) - plain(batch()[0])).abs().max() < 1e-5
    (loss_a, grads_a), (loss_b, grads_b) = loss_and_gradients(flash), loss_and_gradients(plain)
    assert abs(loss_a - loss_b) < 1e-5
    assert largest_difference(grads_a, grads_b) < 1e-5


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "family, how, recompute",
    [
        slow([], "1", "none"),
        slow(LLAMA, "1", "none"),
        (MODERN, "1", "none"),
        slow([], "model", "selective"),
        slow(LLAMA, "model", "block"),
        slow(MODERN, "model", "none"),
    ],
    ids=["gpt2", "llama", "modern", "gpt2-model", "llama-model", "modern-model"],
)
def test_compiled_gives_the_same_numbers_as_eager(family, how, recompute):
    model = make(*family)
    eager_loss, eager = loss_and_gradients(model)
    compile_with(model, family, how, recompute)
    assert [n for n, _ in model.named_parameters()] == list(eager)  # no _orig_mod. in a name
    compiled_loss, compiled = loss_and_gradients(model)
    assert abs(compiled_loss - eager_loss) < 1e-5
    assert largest_difference(compiled, eager) < 1e-5


def compile_with(model, family, how, recompute="none"):
    torch._dynamo.reset()
    for block in model.h:
        block.activation_checkpointing = recompute
    compile_model(model, load_config([*SMALL, *family, f"--compile={how}"], world_size=1), torch.device("cpu"))


@pytest.fixture
def without_inductor(monkeypatch):
    """torch.compile traces as usual and runs the traced graph without Inductor."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize(
    "family, given, recompute",
    [
        ([], "nothing", "selective"),
        (LLAMA, "documents", "block"),
        (MODERN, "window", "none"),
        (NANOCHAT, "nothing", "none"),
        ([], "documents", "none"),
    ],
)
def test_the_whole_forward_pass_is_one_graph(without_inductor, family, given, recompute):
    """fullgraph=True raises at a graph break."""
    family = [*family, "--sliding_window=7"] if given == "window" else family
    model, (idx, targets) = make(*family), batch()
    positions = torch.arange(48).remainder(13).expand_as(idx) if given == "documents" else None
    expected = model(idx, targets, positions=positions)[0].item()
    compile_with(model, family, "model", recompute)
    loss, _ = model(idx, targets, positions=positions)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_and_samples_of_any_length_compile_once(without_inductor):
    """One graph for training, one without gradients, none for other text lengths."""
    model, (idx, targets) = make(), batch()
    compile_with(model, [], "model")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        model(idx, targets)[0].backward()
        with torch.no_grad():
            model(idx, targets)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # and the chunk of the loss
    with torch.compiler.set_stance("force_eager"):
        for _ in generate(model.eval(), [[1], [2, 3, 4]], 5, Sampling(temperature=0)):
            pass
        with torch.no_grad():
            for length in range(2, 9):
                model(idx[:, :length], targets[:, :length], each=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAMILIES
def test_the_residual_stream_has_its_dtype_in_every_block(family, dtype):
    model = make(*family)
    model.residual_dtype, seen = dtype, []
    for block in model.h:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = model(*batch())
    (loss / count).backward()
    assert seen == [dtype] * 2 * len(model.h)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert (loss / count).item() == pytest.approx((make(*family)(*batch())[0] / count).item(), rel=1e-2)


@FAMILIES
def test_no_position_sees_the_future(family):
    model = make(*family).eval()
    x = batch(rows=1)[0]
    changed = x.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 301
    assert torch.equal(model(x)[0, :30], model(changed)[0, :30])
    assert not torch.equal(model(x)[0, 30:], model(changed)[0, 30:])


def test_logits_of_one_position_per_row():
    model = make().eval()
    last = torch.tensor([3, 0])
    x = batch(rows=2)[0]
    assert torch.allclose(model(x, last=last), model(x)[[0, 1], last], atol=1e-6)


def test_initial_value_depends_on_seed_name_and_shape_alone():
    config = make().config
    shape = torch.Size([8, 8])
    first = initial_value("h.0.attn.c_attn.weight", shape, config, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, initial_value("h.0.attn.c_attn.weight", shape, config, seed=1))
    assert not torch.equal(first, initial_value("h.1.attn.c_attn.weight", shape, config, seed=1))
    assert not torch.equal(first, initial_value("h.0.attn.c_attn.weight", shape, config, seed=2))


def test_deeper_models_share_the_weights_of_their_first_blocks():
    shallow, deep = make("--n_layer=2"), make("--n_layer=3")
    assert torch.equal(shallow.h[1].attn.c_attn.weight, deep.h[1].attn.c_attn.weight)


def test_initial_scales_are_gpt2s():
    model = make("--n_embd=256", "--vocab_size=5000")
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.02)
    assert model.h[0].attn.c_attn.bias.abs().max() == 0
    assert (model.ln_f.weight == 1).all()
    assert make("--zero_init=1").h[0].attn.c_proj.weight.abs().max() == 0
    untied = make("--tie_embeddings=0", "--embedding_std=1", "--head_init=zero", "--vocab_size=5000")
    assert untied.wte.weight.std().item() == pytest.approx(1, rel=0.02) and not untied.lm_head.weight.any()
    assert untied.wpe.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_zero_head_needs_an_untied_head_only_if_it_is_drawn():
    with pytest.raises(UserError, match="--head_init=zero: .*--tie_embeddings=0"):
        make("--head_init=zero")


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_without_weights_are_norms_whose_weights_are_one(norm):
    flags = [f"--norm={norm}", "--qk_norm=1", "--embedding_norm=1", "--positions=rotary"]
    model, bare = make(*flags), make(*flags, "--norm_weight=0")
    added = {n for n, _ in model.named_parameters()} - {n for n, _ in bare.named_parameters()}
    assert len(added) == (2 if norm == "layernorm" else 1) * 6 + 4  # of two blocks: two norms, queries and keys
    assert (model(batch()[0]) - bare(batch()[0])).abs().max() < 1e-6
    assert bare.num_params() == sum(p.numel() for p in bare.parameters()) - 19 * 64  # rows of padding
    assert model.num_params() - bare.num_params() == sum(dict(model.named_parameters())[n].numel() for n in added)


def test_the_embedding_norm_precedes_the_positions():
    model = make("--embedding_norm=1", "--norm=rmsnorm", "--norm_weight=0")
    idx = batch()[0]
    x, _ = model.embed(idx, 0, None, check=True)
    normalised = torch.nn.functional.rms_norm(model.wte(idx), (64,), eps=1e-5)
    assert torch.equal(x, normalised + model.wpe(torch.arange(48)))


@pytest.mark.parametrize("width", [128, 384, pytest.param(768, marks=pytest.mark.slow)])
def test_the_first_loss_is_a_uniform_guess_plus_half_the_variance_of_the_logits(width):
    """Logits have variance C·0.02²: normalised states of width C times weights of variance 0.02²."""
    config = load_config([f"--n_embd={width}", "--n_head=4", "--n_layer=2", "--sequence_length=128"], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        loss, count = model(*batch(rows=4, length=128, vocab=50257))
    expected = math.log(50257) + width * 0.02**2 / 2
    assert (loss / count).item() == pytest.approx(expected, abs=0.05)
    if width <= 384:
        assert (loss / count).item() == pytest.approx(math.log(50257), abs=0.1)


def test_dropout_acts_in_training_only():
    model = make("--dropout=0.5")
    x = batch()[0]
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = rotary_table(torch.arange(64), ModelConfig(n_head=1, n_embd=16))

    def score(i, j):
        return (apply_rotary(q, cos[i : i + 1], sin[i : i + 1]) * apply_rotary(k, cos[j : j + 1], sin[j : j + 1])).sum()

    assert score(5, 2).item() == pytest.approx(score(45, 42).item(), abs=1e-4)
    assert score(0, 0).item() == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_flops_follow_the_formula():
    model = make()
    multiplied = model.num_params() - 48 * 64  # all but the position table; the tied embedding is the head
    assert model.flops_per_token(48) == 6 * multiplied + 12 * 2 * 64 * 48
    untied = make("--tie_embeddings=0")
    assert untied.flops_per_token(48) == model.flops_per_token(48)


def test_wrong_shapes_are_an_error():
    model = make()
    with pytest.raises(ValueError, match="position table has 48 rows"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="must be"):
        model(torch.zeros(4, dtype=torch.long))


@FAMILIES
@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_does_not_change_the_gradients(family, recompute, dropout):
    plain, recomputing = (make(*family, f"--dropout={dropout}") for _ in range(2))
    for block in recomputing.h:
        block.activation_checkpointing = recompute
    found = []
    for model in (plain, recomputing):
        torch.manual_seed(0)
        found.append(loss_and_gradients(model))
    assert found[0][0] == found[1][0] and largest_difference(found[0][1], found[1][1]) == 0


def test_selective_checkpointing_with_dropout_recomputes_attention():
    """A saved kernel would not advance the generator on CUDA. The CPU can only check which operations are saved."""
    assert not PRODUCTS & ATTENTION
    for contexts, attention_is_kept in ((save_products_and_attention, True), (save_products, False)):
        policy = contexts()[0].policy_fn
        kept = {policy(None, op) is CheckpointPolicy.MUST_SAVE for op in ATTENTION}
        assert kept == {attention_is_kept}
        assert all(policy(None, op) is CheckpointPolicy.MUST_SAVE for op in PRODUCTS)


def test_compiling_one_model_does_not_change_the_loss_of_another(without_inductor):
    first, second = make(), make()
    compile_with(first, [], "1")
    assert first.chunk_loss is not chunk_loss_and_grad and second.chunk_loss is chunk_loss_and_grad
