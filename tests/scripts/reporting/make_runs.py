"""Folders that look like those of runs, for the tests of the report and for its screenshot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TOKENS_PER_STEP, FLOPS_PER_TOKEN = 524_288, 860_000_000


def record(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """Returns a record as train/metrics.py writes it."""
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "lr": 6e-4 * min(1, step / 700),
        "grad_norm": 0.5,
        "tok_per_s": 2.1e6,
        "mfu": 0.45,
        "elapsed_s": step * 0.25,
        "memory_bytes": 42 * 2**30,
        **more,
    }


def write_run(folder: Path, records: list[dict[str, Any]], **config: Any) -> Path:
    """Writes a finished run with these records and flags; returns its folder."""
    for name in ("checkpoints", "samples", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = {"num_iterations": records[-1]["step"] if records else 10, "seed": 1337, "dtype": "bfloat16", **config}
    (folder / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **flags}))
    (folder / "status.json").write_text('{"status": "done", "step": null, "reason": ""}')
    return folder


def write_facts(folder: Path, starts: list[int], ranks: int = 8, rollbacks: list[dict[str, Any]] | None = None) -> None:
    """Writes run.json with starts after these steps."""
    facts = {
        "time": "2026-11-20T08:15:00Z",
        "device": "NVIDIA H100 80GB HBM3",
        "ranks": ranks,
        "strategy": "ZeRO-2 on 8",
        "parameters": 124_439_808,
        "flops_per_token": FLOPS_PER_TOKEN,
        "torch": "2.13.0+cu130",
        "commit": "4f1c2ab99d0e7b65c3a1d2e4f5a6b7c8d9e0f1a2",
    }
    content = {"starts": [{"step": step, **facts} for step in starts], "rollbacks": rollbacks or []}
    (folder / "run.json").write_text(json.dumps(content))


def long_run(folder: Path, steps: int, noise: int = 0, floor: float = 3.25, **config: Any) -> Path:
    """Writes a run that looks like GPT-2 124M on 10 billion tokens, with spikes, evaluations and saves."""
    rng = np.random.default_rng(noise)
    k = np.arange(1, steps + 1)
    loss = floor + 7.7 * np.exp(-k / steps * 60) + 0.55 * np.exp(-k / steps * 4) + rng.normal(0, 0.035, steps)
    norm = 0.3 + 2 * np.exp(-k / steps * 40) + rng.gamma(2, 0.03, steps)
    speed = 2.1e6 * (1 + rng.normal(0, 0.006, steps) - (rng.random(steps) < 0.004) * rng.random(steps) * 0.5)
    for at in rng.integers(steps // 10, steps, 3):
        loss[at], norm[at] = loss[at] + 1.5, 9.0
    lr = 6e-4 * np.minimum(k / (steps * 0.035), 0.1 + 0.45 * (1 + np.cos(math.pi * k / steps)))
    elapsed = np.cumsum(TOKENS_PER_STEP / speed)
    every, records = max(1, steps // 80), []
    for i in range(steps):
        more = {"lr": lr[i], "grad_norm": norm[i], "tok_per_s": speed[i], "elapsed_s": elapsed[i]}
        more |= {"mfu": speed[i] * FLOPS_PER_TOKEN / 8 / 989e12}
        if k[i] % every == 0:
            more |= {"val_loss": loss[i] + 0.02, "val_bpb": (loss[i] + 0.02) / 3.1}
        if k[i] % (5 * every) == 0:
            more |= {"hellaswag_acc_norm": 0.25 + 0.06 * (1 - math.exp(-3 * k[i] / steps)) + rng.normal(0, 0.001)}
            more |= {
                "hellaswag_lm_eval_acc_norm": 0.255 + 0.07 * (1 - math.exp(-3 * k[i] / steps)),
                "save_s": 1 + rng.random(),
            }
        records.append(record(int(k[i]), float(loss[i]), **{n: float(v) for n, v in more.items()}))
    return write_run(folder, records, **config)
