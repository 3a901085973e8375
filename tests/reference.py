"""A trainer written from the definitions, to compare train_gpt.py with. It shares no code with the product.

It uses full logits, F.cross_entropy, torch's AdamW and clip_grad_norm_, and loops over micro-batches and ranks.
It computes in float64, so a difference is an error or float32 rounding. `c` holds the flags of train_gpt.py.
"""

import hashlib
import math
from glob import glob
from os.path import exists

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def make_norm(c, width):
    return nn.RMSNorm(width, c.norm_eps) if c.norm == "rmsnorm" else nn.LayerNorm(width, c.norm_eps, bias=c.bias)


def rotate(x, base):
    """Reads dimensions i and i + D/2 of x (B, H, T, D) as a complex number and turns it by position · base^(-2i/D)."""
    T, D = x.shape[-2:]
    angles = torch.outer(torch.arange(T), base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D))
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=-1)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.head, self.dropout = c, c.n_embd // c.n_head, nn.Dropout(c.dropout)
        self.ln_1, self.ln_2 = make_norm(c, c.n_embd), make_norm(c, c.n_embd)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * self.head, c.bias)})
        self.attn["c_proj"] = nn.Linear(c.n_embd, c.n_embd, c.bias)
        width = 2 * c.mlp_hidden if c.mlp == "swiglu" else c.mlp_hidden
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(c.n_embd, width, c.bias)})
        self.mlp["c_proj"] = nn.Linear(c.mlp_hidden, c.n_embd, c.bias)

    def forward(self, x):  # (B, T, C)
        x = x + self.dropout(self.attn["c_proj"](self.attention(self.ln_1(x))))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value if self.c.mlp == "swiglu" else F.gelu(hidden, approximate="tanh")
        return x + self.dropout(self.mlp["c_proj"](hidden))

    def attention(self, x):
        c, (B, T, C), kv_width = self.c, x.shape, self.c.n_kv_head * self.head
        parts = self.attn["c_attn"](x).split([C, kv_width, kv_width], dim=-1)
        q, k, v = (part.view(B, T, -1, self.head).transpose(1, 2) for part in parts)  # (B, heads, T, head)
        if c.positions == "rotary":
            q, k = rotate(q, c.rope_base), rotate(k, c.rope_base)
        k, v = (y.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for y in (k, v))
        future = torch.full((T, T), -math.inf).triu(1)
        weights = (q @ k.mT / math.sqrt(self.head) + future).softmax(-1)
        return (self.dropout(weights) @ v).transpose(1, 2).reshape(B, T, C)


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, padded = c, 64 * math.ceil(c.vocab_size / 64)
        self.wte = nn.Embedding(padded, c.n_embd)
        self.wpe = nn.Embedding(c.sequence_length, c.n_embd) if c.positions == "learned" else None
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = make_norm(c, c.n_embd)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.n_embd, padded, bias=False)

    def forward(self, idx):  # (B, T) -> logits (B, T, vocab_size)
        x = F.dropout(self.wte(idx) + (self.wpe.weight if self.wpe else 0), self.c.dropout, self.training)
        for block in self.h:
            x = block(x)
        return (self.ln_f(x) @ (self.lm_head or self.wte).weight.T)[..., : self.c.vocab_size]


def summed_loss(model, rows, counted):
    """Returns the summed loss of the targets that are counted; `counted` has the shape of rows."""
    losses = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return (losses * counted[:, 1:].flatten()).sum()


@torch.no_grad()
def initialized(model, c):
    """Sets biases to 0, norms to 1 and weights to N(0, 0.02²), divided by √(2·n_layer) where a branch ends."""
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02
        seed = int.from_bytes(hashlib.sha256(f"{c.seed}:{name}".encode()).digest()[:8], "little") // 2
        drawn = torch.empty(p.shape, dtype=torch.float32).normal_(0, std, generator=torch.Generator().manual_seed(seed))
        p.copy_(drawn if p.dim() > 1 else torch.tensor(float(name.endswith("weight"))))
    return model


def permuted(place, n, key):
    """Takes a place in range(n) to another: a Feistel network with SplitMix64 rounds, repeated until below n."""
    half = max(1, math.ceil((n - 1).bit_length() / 2))
    for k in np.frombuffer(hashlib.shake_128(key.encode()).digest(48), "<u8").tolist():
        left, right = divmod(place, 2**half)
        x = (right + k) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        place = right * 2**half + (left ^ (x ^ x >> 31) % 2**half)
    return place if place < n else permuted(place, n, key)


def windows(pattern, T):
    """Returns all tokens, cut into windows that overlap by one token, and which are counted: (W, T + 1) int64 each."""
    paths = sorted(glob(pattern))
    files = [np.fromfile(path, "<u2", offset=1024) for path in paths]
    masks = [path.replace(".bin", ".mask") for path in paths]
    masks = [np.fromfile(m, "u1") if exists(m) else np.ones_like(f) for m, f in zip(masks, files, strict=True)]
    return [torch.from_numpy(np.concatenate(a).astype(np.int64)).unfold(0, T + 1, T) for a in (files, masks)]


def learning_rate(step, c):
    """Linear warm-up, then cosine, linear, constant or wsd: linear over the last `cooldown_frac` of the run."""
    if step <= c.warmup_iters:
        return c.learning_rate * step / c.warmup_iters
    decay = c.cooldown_frac * c.num_iterations if c.schedule == "wsd" else c.num_iterations - c.warmup_iters
    left = 1.0 if c.schedule == "constant" else min(1.0, (c.num_iterations - step) / decay)
    if c.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return c.learning_rate * (c.learning_rate_decay_frac + (1 - c.learning_rate_decay_frac) * left)


def train(c, train_bin, val_bin, ranks=1):
    """Trains and returns a record per step (step, loss, lr, grad_norm, val_loss) and the weights by name."""
    model = initialized(GPT(c).double(), c)
    (data, mask), (val_data, val_mask) = (windows(files, c.sequence_length) for files in (train_bin, val_bin))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.adam_eps)
    n, records = c.total_batch_size // c.sequence_length, []
    for step in range(1, c.num_iterations + 1):
        places = [divmod(k, len(data)) for k in range((step - 1) * n, step * n)]
        chosen = torch.tensor([permuted(place, len(data), f"{c.seed}:{epoch}") for epoch, place in places])
        loss, tokens = 0.0, mask[chosen, 1:].sum()
        for rank, part in enumerate(chosen.chunk(ranks)):
            torch.manual_seed(int(np.random.SeedSequence([c.seed, step, rank]).generate_state(1)[0]))
            for micro_batch in part.split(c.batch_size):
                share = summed_loss(model, data[micro_batch], mask[micro_batch]) / tokens
                share.backward()
                loss += share.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"step": step, "loss": loss, "lr": learning_rate(step, c), "grad_norm": norm})
        if step % c.val_loss_every == 0 or step == c.num_iterations:
            wanted = min(len(val_data), c.val_max_steps * n)  # evenly spread
            rows, counted = (a[[i * len(val_data) // wanted for i in range(wanted)]] for a in (val_data, val_mask))
            records[-1]["val_loss"] = (summed_loss(model.eval(), rows, counted) / counted[:, 1:].sum()).item()
            model.train()
    return records, {name: p.detach() for name, p in model.named_parameters()}
