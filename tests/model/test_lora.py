"""Adapters against a plain LoRA written here: values, gradients, what is frozen, what is computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cfg.config import load_config
from model.gpt import GPT, init_weights
from model.lora import FrozenLinear, LoRALinear, adapter_value, add_adapters, merge_adapter, saved_names
from model.loss import linear_cross_entropy
from util.errors import UserError

SHAPE = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--vocab_size=251", "--n_positions=32", "--device=cpu"]
SHAPE += ["--sequence_length=16"]
FAMILIES = {
    "gpt2": [],
    "llama": ["--norm=rmsnorm", "--mlp=swiglu", "--positions=rotary", "--n_kv_head=2", "--tie_embeddings=0"],
}
IDS = torch.arange(3 * 17).view(3, 17) * 7 % 251


def build(*flags, family="gpt2", dtype=None):
    config = load_config([*SHAPE, *FAMILIES[family], *flags], 1)
    with torch.device("meta"):
        model = GPT(config)
        if config.lora_rank:
            add_adapters(model, config)
    model.to_empty(device="cpu")
    init_weights(model, 1)
    if dtype:
        model.to(dtype).residual_dtype = dtype
    return model, config


def loss_of(model, config):
    logits = model(IDS[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


class PlainLoRA(nn.Module):
    """Hu et al. 2021, section 4.1: W₀x + (alpha/r) B A x."""

    def __init__(self, linear, a, b, alpha):
        super().__init__()
        self.linear, self.a, self.b, self.alpha = linear.requires_grad_(False), nn.Parameter(a), nn.Parameter(b), alpha

    def forward(self, x):
        return self.linear(x) + self.alpha / len(self.a) * (x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all", "attn", "c_fc,attn.c_proj"])
def test_ten_steps_equal_those_of_a_plain_lora_in_float64(family, targets):
    ours, config = build(
        "--lora_rank=3", "--lora_alpha=7", f"--lora_targets={targets}", family=family, dtype=torch.float64
    )
    theirs, _ = build(family=family, dtype=torch.float64)
    theirs.requires_grad_(False)
    adapters = {}
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            a, b = (getattr(module, n).detach().clone() for n in ("lora_a", "lora_b"))
            adapters[name] = PlainLoRA(theirs.get_submodule(name), a, b, 7)
            setattr(theirs.get_submodule(parent), child, adapters[name])
    expected = {"all": 8, "attn": 4, "c_fc,attn.c_proj": 4}[targets]
    assert len(adapters) == expected
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(10):
            loss = loss_of(model, config)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0][-1] < losses[0][0] - 0.1
    for name, plain in adapters.items():
        module = ours.get_submodule(name)
        assert torch.allclose(module.lora_a, plain.a, atol=1e-10, rtol=0) and plain.b.abs().max() > 0.01
        assert torch.allclose(module.lora_b, plain.b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_a_trained_one_equals_the_merged_matrix(family):
    model, config = build("--lora_rank=4", family=family, dtype=torch.float64)
    plain, _ = build(family=family, dtype=torch.float64)
    assert torch.equal(model(IDS), plain(IDS))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".lora_b"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                weight = plain.get_submodule(name).weight
                change = config.lora_alpha / 4 * module.lora_b @ module.lora_a
                found = merge_adapter(weight, module.lora_a, module.lora_b, config.lora_alpha / 4)
                assert found.dtype == torch.float32
                assert torch.allclose(found.double(), weight + change, atol=1e-5)
                weight += change
    assert not torch.allclose(model(IDS), build(family=family, dtype=torch.float64)[0](IDS))
    assert torch.allclose(model(IDS), plain(IDS), atol=1e-10)


@pytest.mark.parametrize("embeddings", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_with_the_flag_embeddings_and_head_are_trained(family, embeddings):
    flags = ["--lora_rank=4", f"--lora_embeddings={embeddings}", "--base_dtype=bfloat16"]
    model, config = build(*flags, family=family)
    sum(model(IDS[:, :-1], IDS[:, 1:])).backward()
    tables = {"gpt2": {"wte.weight", "wpe.weight"}, "llama": {"wte.weight", "lm_head.weight"}}[family]
    for name, p in model.named_parameters():
        trained = name.endswith((".lora_a", ".lora_b")) or (bool(embeddings) and name in tables)
        assert p.requires_grad == trained == (p.grad is not None), name
        assert p.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert (name in saved_names(dict(model.named_parameters()), config)) == trained
    assert model.num_params(trained=True) == sum(
        p.numel() - ((256 - 251) * 32 if n in ("wte.weight", "lm_head.weight") else 0)
        for n, p in model.named_parameters()
        if p.requires_grad
    )
    plain, _ = build(family=family)
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert model.num_params() == plain.num_params() + adapters


def test_converted_embeddings_are_saved_although_they_are_not_trained():
    config = load_config([*SHAPE, "--lora_rank=4"], 1).model_copy(update={"resize_embeddings": True})
    names = ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.lora_a", "h.0.attn.c_attn.weight"]
    assert saved_names(names, config) == {"wte.weight", "h.0.attn.c_attn.lora_a"}


def test_initial_values_depend_on_seed_name_and_shape_and_are_uniform():
    shape = torch.Size((64, 400))
    a = adapter_value("h.0.attn.c_attn.lora_a", shape, 1)
    assert torch.equal(a, adapter_value("h.0.attn.c_attn.lora_a", shape, 1)) and a.dtype == torch.float32
    assert not torch.equal(a, adapter_value("h.0.attn.c_attn.lora_a", shape, 2))
    assert not torch.equal(a, adapter_value("h.1.attn.c_attn.lora_a", shape, 1))
    bound = 1 / 400**0.5
    assert 0.999 * bound < a.abs().max() < bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not adapter_value("h.0.attn.c_attn.lora_b", shape, 1).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_frozen_weights_in_bfloat16_give_the_losses_of_their_values_in_float32(family, dtype):
    """The values that bfloat16 holds exactly: both computations then differ at most in the order of casts."""
    model, _ = build("--lora_rank=4", "--base_dtype=bfloat16", family=family)
    other, _ = build("--lora_rank=4", family=family)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    results = []
    for m in (model, other):
        with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = m(IDS[:, :-1], IDS[:, 1:])[0]
            logits = m(IDS[:, :-1])
        loss.backward()
        results.append((loss.item(), logits.float(), {n: p.grad for n, p in m.named_parameters() if p.requires_grad}))
    (loss, logits, gradients), (loss_2, logits_2, gradients_2) = results
    assert loss == pytest.approx(loss_2, rel=1e-6) and torch.allclose(logits, logits_2, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients_2[name], atol=1e-6), name


def test_a_cast_input_is_cast_once():
    model, _ = build("--lora_rank=4", "--base_dtype=bfloat16", family="llama")
    layer, casts = model.h[0].attn.c_attn, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Count():
        assert layer(x).dtype == torch.bfloat16
    assert sorted(casts) == sorted([(2, 16, 32), (4, 32), (64, 4)])  # x, A and B, but not the matrix


@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize("dropout", ["--dropout=0", "--dropout=0.2"])
def test_dropout_draws_equal_masks_when_it_is_recomputed(recompute, dropout):
    gradients = []
    for kind in ("none", recompute):
        model, _ = build("--lora_rank=4", "--lora_dropout=0.3", dropout)
        for block in model.h:
            block.activation_checkpointing = kind
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith(".lora_b"):
                    p.fill_(0.1)
        torch.manual_seed(5)
        model(IDS[:, :-1], IDS[:, 1:])[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_adapter_dropout_acts_on_the_adapter_only():
    model, _ = build("--lora_rank=4", "--lora_dropout=0.5")
    plain, _ = build()
    assert torch.equal(model(IDS), plain(IDS))  # B is zero


def test_matrices_without_an_adapter_cast_their_frozen_weights_too():
    model, _ = build("--lora_rank=4", "--lora_targets=attn", "--base_dtype=bfloat16")
    assert type(model.h[0].mlp.c_fc) is FrozenLinear and type(model.h[0].attn.c_attn) is LoRALinear
    assert model(IDS).dtype == torch.float32


def test_no_gradient_of_a_frozen_head_is_computed(monkeypatch):
    hidden, weight = torch.randn(37, 24, requires_grad=True), torch.randn(320, 24)
    targets = torch.arange(37)
    expected = linear_cross_entropy(hidden, weight.clone().requires_grad_(), targets, 301)[0]
    wanted = torch.autograd.grad(expected, hidden)[0]

    def fail(*args):
        raise AssertionError("the gradient of the head is computed")

    monkeypatch.setattr("model.loss.add_product", fail)
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t, **k: made.append(t.shape) or zeros_like(t, **k))
    loss = linear_cross_entropy(hidden, weight, targets, 301)[0]
    loss.backward()
    assert loss.item() == expected.item() and torch.equal(hidden.grad, wanted)
    assert weight.shape not in made


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_count_4_for_a_frozen_and_6_for_a_trained_parameter(family):
    """Counted by torch on the products of one forward and backward pass, without attention."""
    for flags in (["--lora_rank=4"], ["--lora_rank=4", "--lora_embeddings=1"]):
        model, config = build(*flags, family=family)
        attention = 12 * config.n_layer * config.n_embd * 16
        vectors = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p.dim() < 2)
        rows = model.wte.num_embeddings - config.vocab_size
        padding = rows * config.n_embd * (6 if model.head_weight.requires_grad else 4)
        with FlopCounterMode(display=False) as counter:
            model(IDS[:, :16].contiguous(), IDS[:, 1:].contiguous())[0].backward()
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        # The input of the first block needs no gradient unless embeddings are trained.
        first = model.h[0].attn.c_attn.weight.numel() + model.h[0].attn.c_attn.lora_a.numel()
        # The counter does not know addmm_, which makes the gradient of a trained head.
        skipped = 2 * (model.wte.weight.numel() if "--lora_embeddings=1" in flags else first)
        per_token = products / IDS[:, :16].numel()
        assert model.flops_per_token(16) - attention - vectors + padding - skipped == per_token


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank=4", "--lora_targets=q_proj"], "q_proj is a part of c_attn, which has one adapter"),
        (["--lora_rank=4", "--lora_targets=attn,up_proj"], "up_proj is a part of c_fc"),
        (["--lora_rank=4", "--lora_targets=o_proj"], "use attn.c_proj"),
        (["--lora_rank=4", "--lora_targets=c_proj"], "give attn.c_proj or mlp.c_proj, or both"),
        (["--lora_rank=4", "--lora_targets="], "--lora_targets=: "),
        (["--lora_rank=4", "--lora_targets=attn,,mlp"], "--lora_targets=attn,,mlp: "),
        (["--lora_rank=4", "--lora_targets=lm_head"], "lm_head is not a matrix of a block"),
        (["--lora_rank=4", "--lora_targets=embed_tokens"], "with --lora_embeddings=1"),
        (["--lora_rank=33"], "--lora_rank=33: attn.c_attn has a side of 32"),
        (["--lora_rank=4", "--optimizer=muon"], "--optimizer=muon: does not train the adapters of --lora_rank"),
        (["--lora_alpha=16"], "--lora_alpha=16.0: has no effect without adapters; give --lora_rank"),
        (["--lora_dropout=0.1"], "--lora_dropout=0.1: has no effect"),
        (["--lora_targets=attn"], "--lora_targets=attn: has no effect"),
        (["--lora_embeddings"], "--lora_embeddings=1: has no effect"),
        (["--lora_init=folder"], "--lora_init=folder: has no effect"),
        (["--base_dtype=bfloat16"], "--base_dtype=bfloat16: has no effect"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    with pytest.raises(UserError) as error:
        load_config([*SHAPE, *flags], 1)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_adapters_give_the_numbers_of_eager_ones(whole):
    model, _ = build("--lora_rank=4", "--lora_dropout=0", family="llama")
    eager = copy.deepcopy(model)
    if whole:
        model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)
    else:
        for block in model.h:
            block.activation_checkpointing = "selective"
            block.forward = torch.compile(block.forward)
    for m in (model, eager):
        m(IDS[:, :-1], IDS[:, 1:])[0].backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.allclose(p.grad, q.grad, atol=1e-5), name
