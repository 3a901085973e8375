"""Muon against an SVD and against a plain implementation of one step."""

import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cfg.config import load_config
from model.gpt import GPT, init_weights
from train.disk_space import checkpoint_bytes
from train.memory import MUON_STEP_BYTES
from train.muon import Muon, normalize_rows, orthogonalize
from train.optim import make_optimizer, make_states, set_schedules
from train.summary import warnings
from util.errors import UserError

BAND = 0.84, 1.15  # of singular values after five Polar Express steps from 0.001 on


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (1, 16), (16, 1)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2.5, min(shape), dtype=torch.float64)
    found = orthogonalize((u * values @ vt).float()).double()
    in_the_old_vectors = u.mT @ found @ vt.mT
    diagonal = in_the_old_vectors.diagonal()
    assert BAND[0] < diagonal.min() and diagonal.max() < BAND[1]
    assert (in_the_old_vectors - diagonal.diag()).abs().max() < 1e-4


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(4, 8)).any()
    assert not normalize_rows(torch.zeros(4, 8), torch.zeros(4, 1), 0.95).any()


def plain_muon(weight, gradient, state, parts, lr, momentum, decay, beta2):
    """Makes one step in float64, with an exact SVD-free iteration written out for one matrix after the other."""
    state["m"] = momentum * state["m"] + (1 - momentum) * gradient
    nesterov = (1 - momentum) * gradient + momentum * state["m"]
    row, pieces = 0, []
    for rows in parts:
        x = nesterov[row : row + rows].clone()
        x /= 1.02 * x.square().sum().sqrt() + 1e-6
        for a, b, c in (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ):
            once = x @ x.T @ x
            x = a * x + b * once + c * x @ x.T @ once
        norm = x.square().sum().sqrt()
        v = state["v"][row : row + rows]
        v.copy_(beta2 * v + (1 - beta2) * (x**2).sum(1, keepdim=True) / x.size(1))
        x = x / v.sqrt()
        pieces.append(x / x.square().sum().sqrt() * norm * math.sqrt(max(1, rows / x.size(1))))
        row += rows
    update = torch.cat(pieces)
    shrinks = (update.sign() == weight.sign()) & (update != 0)
    return weight - lr * update - lr * decay * weight * shrinks


FLAGS = [
    *("--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=32", "--mlp_hidden=48", "--vocab_size=61"),
    *("--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--tie_embeddings=0", "--bias=0", "--sequence_length=16"),
    *("--optimizer=muon", "--num_iterations=10", "--weight_decay=0.3", "--adam_eps=1e-8", "--beta2=0.9"),
    *("--matrix_lr=0.03", "--embedding_lr=0.2", "--head_lr=0.01", "--scalar_lr=0.02", "--schedule=constant"),
]
PARTS = {"c_attn": [32, 16, 16], "attn.c_proj": [32], "c_fc": [48, 48], "mlp.c_proj": [32]}
RATES = {"wte": 0.2 * 0.02, "lm_head": 0.01, "ln_": 0.02}  # the embedding's is relative to --embedding_std


def test_steps_are_those_of_a_plain_implementation():
    config = load_config([*FLAGS, "--device=cpu"], 1)
    model = GPT(config)
    init_weights(model, 1)
    optimizer = make_optimizer(model, config, 1)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    states = {n: {"m": torch.zeros_like(e), "v": torch.zeros(len(e), 1).double()} for n, e in expected.items()}
    adam = {n: torch.zeros_like(e).requires_grad_() for n, e in expected.items() if any(k in n for k in RATES)}
    for n, p in adam.items():
        p.data.copy_(expected[n])
    rates = {n: next(rate for key, rate in RATES.items() if key in n) for n in adam}
    groups = [{"params": [p], "lr": rates[n]} for n, p in adam.items()]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
    torch.manual_seed(0)
    for step in (1, 2, 3):
        for n, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if n in adam:
                adam[n].grad = p.grad.double()
            else:
                parts = next(rows for key, rows in PARTS.items() if key in n)
                settings = 0.03, 0.85 + 0.1 * step / 300, 0.3 * (1 - step / 10), 0.9
                expected[n] = plain_muon(expected[n], p.grad.double(), states[n], parts, *settings)
        set_schedules(optimizer, step, config)
        optimizer.step()
        reference.step()
    expected |= {n: p.detach() for n, p in adam.items()}
    for n, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach().double(), expected[n], rtol=2e-5, atol=2e-6, msg=lambda m, n=n: f"{n}: {m}"
        )


def test_frozen_parameters_are_not_updated_and_need_no_matrices():
    config = load_config([*FLAGS, "--device=cpu"], 1)
    model = GPT(config)
    for name, p in model.named_parameters():
        p.requires_grad = "ln_" in name
    optimizer = make_optimizer(model, config, 1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    assert not any(group["parts"] for group in optimizer.param_groups)


def test_the_room_for_a_checkpoint_is_that_of_weights_and_states():
    config = load_config([*FLAGS, "--device=cpu"], 1)
    model = GPT(config)
    tensors = [*model.parameters(), *make_states(make_optimizer(model, config, 1), model).values()]
    assert checkpoint_bytes(model, config) == sum(t.nbytes for t in tensors if t.dim())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--optimizer=muon --learning_rate=1", "with --optimizer=muon; use --matrix_lr, --embedding_lr, --head_lr,"),
        ("--head_lr=1", "with --optimizer=adamw; use --learning_rate, or add --optimizer=muon"),
        ("--optimizer=muon --head_lr=1", "with --tie_embeddings=1; --embedding_lr is the rate of a tied head"),
        ("--cfg=modern-124m --scalar_lr=1", "on a model without biases and norm weights; leave it out"),
    ],
)
def test_a_learning_rate_without_effect_is_an_error(flags, message):
    with pytest.raises(UserError, match=f"{flags.split()[-1]}.0: has no effect {message}"):
        load_config(flags.split(), 1)


def test_a_rate_in_a_preset_that_has_no_effect_is_a_warning():
    (warning,) = warnings(load_config(["--cfg=sft", "--optimizer=muon"], 1), torch.device("cpu"), [], [])
    assert warning.startswith("--learning_rate=2e-05: has no effect with --optimizer=muon; use --matrix_lr")
    assert not warnings(load_config(["--cfg=modern-124m"], 1), torch.device("cpu"), [], [])


def test_the_default_rates_train_gpt2s_model():
    torch.manual_seed(0)
    flags = ["--n_layer=1", "--n_head=2", "--n_embd=256", "--vocab_size=61", "--sequence_length=16"]
    config = load_config([*flags, "--optimizer=muon", "--device=cpu", "--num_iterations=20"], 1)
    model = GPT(config)
    init_weights(model, 1)
    optimizer, tokens, losses = make_optimizer(model, config, 1), torch.randint(61, (8, 17)), []
    for step in range(1, 21):
        loss = model(tokens[:, :-1], tokens[:, 1:])[0] / tokens[:, 1:].numel()
        loss.backward()
        set_schedules(optimizer, step, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert max(losses) < losses[0] + 0.2 and losses[-1] < losses[0] - 1


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and alive, and their highest number."""

    def __init__(self):
        super().__init__()
        self.alive = self.highest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_place_or_view = any(r.alias_info for r in func._schema.returns)
        if isinstance(result, torch.Tensor) and not in_place_or_view:
            self.freed(-result.untyped_storage().nbytes())
            weakref.finalize(result.untyped_storage(), self.freed, result.untyped_storage().nbytes())
        return result

    def freed(self, size):
        self.alive -= size
        self.highest = max(self.highest, self.alive)


@pytest.mark.parametrize("parts", [[4096], [1024, 1024, 1024], [2752, 2752]])
def test_a_step_needs_the_planned_memory(parts):
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(sum(parts), 1024, device="cuda"))
        optimizer = Muon([{"params": [p], "parts": parts, "betas": (0.9, 0.95), "weight_decay": 0.1}], lr=0.1)
        p.grad = torch.empty_like(p)
        optimizer.step()
        with Peak() as peak:
            optimizer.step()
    assert 0.9 * MUON_STEP_BYTES < peak.highest / p.numel() <= MUON_STEP_BYTES
