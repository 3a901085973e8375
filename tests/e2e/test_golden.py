"""Recorded numbers of whole runs in full precision. They show whether a change of the code changed the numbers.

Each file in tests/golden/ holds the numbers of one run, and the processor and torch version that it was made with.
Kernels choose their instructions by processor, which changes the last bits of a sum. So the comparison is exact only
on the same processor and torch version. Elsewhere numbers must agree within a tolerance, and text (samples, hashes,
reasons) is not compared. RAWGPT_REWRITE_GOLDEN=1 rewrites the files.
"""

import hashlib
import json
import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards import write_shard
from model.formats.checkpoint import load_tensors, tensor_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-6  # of losses and gradient norms, relative to max(1, |x|)
TENSOR_TOLERANCE = 1e-4  # of the norms of weights and moments, relative: a moment may be as small as 1e-7
SETTINGS = {  # ranks, stage, file; stage 1 is bit-equal to stage 0
    "one_process": (1, 0, "one_process.json"),
    "two_ranks_stage_0": (2, 0, "two_ranks.json"),
    "two_ranks_stage_1": (2, 1, "two_ranks.json"),
    "two_ranks_stage_3": (2, 3, "two_ranks_sharded.json"),
}
KEYS = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "skipped")
VOCAB, BATCH, STEPS = 61, 256, 88
ODD_STEPS = [74, 75, 76]  # the data of these steps is one repeated token
KILLED_AT, SAVED_EVERY = 46, 10
FLAGS = [
    *(f"--vocab_size={VOCAB}", "--tokenizer=none", "--shuffle=0", f"--num_iterations={STEPS}", "--log_every=1"),
    *("--batch_size=2", "--sequence_length=32", f"--total_batch_size={BATCH}", f"--save_every_niter={SAVED_EVERY}"),
    *("--learning_rate=1e-2", "--warmup_iters=8", "--learning_rate_decay_frac=0.05", "--weight_decay=0.2"),
    *("--dropout=0.05", "--adam_eps=1e-4", "--grad_clip=0.5", "--skip_spikes=6", f"--rollback_after={len(ODD_STEPS)}"),
    *("--val_loss_every=30", "--val_max_steps=2", f"--sample_every={STEPS // 2}", "--sample_tokens=16"),
]


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory):
    """Shards in file order: counting modulo the vocabulary, which can be learned, except in the odd steps."""
    folder = tmp_path_factory.mktemp("golden")
    tokens = np.arange((STEPS + 20) * BATCH) % VOCAB
    write_shard(folder / "val.bin", tokens[:3000], VOCAB)
    tokens[(ODD_STEPS[0] - 1) * BATCH : ODD_STEPS[-1] * BATCH] = 7
    write_shard(folder / "train_1.bin", tokens[:10_001], VOCAB)
    write_shard(folder / "train_2.bin", tokens[10_001:], VOCAB)
    return [f"--input_train_bin={folder}/train_*.bin", f"--input_val_bin={folder}/val.bin"]


def records_in(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"step {r['step']}": {key: r[key] for key in KEYS if key in r} for r in records}


def tensors_in(checkpoint, kind):
    """Returns the norm of each tensor of the model or optimizer, and a hash of the bytes of all."""
    tensors = {name: torch.empty(shape) for name, shape in sorted(tensor_shapes(checkpoint, kind).items())}
    load_tensors(checkpoint, kind, tensors)
    content = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    norms = {name: float(tensor.double().norm()) for name, tensor in tensors.items()}
    return {"sha256": hashlib.sha256(content).hexdigest(), "norms": norms}


def made_with():
    cpuinfo = Path("/proc/cpuinfo")
    facts = (
        re.findall(r"^(cpu family|model|model name)\s*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    )
    return {
        "torch": torch.__version__,
        "processor": ", ".join(f"{key} {value}" for key, value in facts[:3]) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def numbers_of(run):
    checkpoint = run / f"checkpoints/step_{STEPS:08d}"
    return {
        "made_with": made_with(),
        "records": records_in(run / "metrics.jsonl"),
        "superseded": records_in(run / "logs/metrics_superseded.jsonl"),
        "samples": {path.name: path.read_text() for path in sorted((run / "samples").iterdir())},
        **{kind: tensors_in(checkpoint, kind) for kind in ("model", "optimizer")},
    }


def flat(content, where=""):
    """Returns the place and value of every leaf, in order."""
    if not isinstance(content, dict):
        return {where: content}
    return {k: v for key, inner in content.items() for k, v in flat(inner, f"{where}, {key}" if where else key).items()}


def is_same(where, found, expected, exact):
    if exact or type(found) is not type(expected) or isinstance(found, int):
        return found == expected
    if isinstance(found, str):
        return True
    if "norms" in where:
        return abs(found - expected) <= TENSOR_TOLERANCE * abs(expected)
    return abs(found - expected) <= TOLERANCE * max(1, abs(expected))


def first_difference(found, golden):
    """Describes the first number that is not the recorded one; "" if there is none."""
    exact = golden["made_with"] == found["made_with"]
    ours, theirs = ({k: v for k, v in flat(x).items() if not k.startswith("made_with")} for x in (found, golden))
    for where in theirs | ours:
        a, b = ours.get(where, "missing"), theirs.get(where, "missing")
        if where not in ours or where not in theirs or not is_same(where, a, b, exact):
            how = "exactly" if exact else "within the tolerance"
            return f"{where}: {a} instead of {b} ({how}; the file was made with {golden['made_with']})"
    return ""


def check_events(found, printed):
    """Checks what must hold in any version: one kill, one roll-back, the odd data skipped, losses that fall."""
    records, superseded = found["records"], found["superseded"]
    back_to = KILLED_AT // SAVED_EVERY * SAVED_EVERY, ODD_STEPS[0] // SAVED_EVERY * SAVED_EVERY
    again = [*range(back_to[0] + 1, KILLED_AT), *range(back_to[1] + 1, ODD_STEPS[-1] + 1)]
    assert list(records) == [f"step {step}" for step in range(1, STEPS + 1)]
    assert list(superseded) == [f"step {step}" for step in again]
    assert printed.count(f"back to step {back_to[1]}") == 1
    skipped = [r for r in [*superseded.values(), *records.values()] if "skipped" in r]
    assert [r["step"] for r in skipped] == ODD_STEPS
    assert all(superseded[f"step {step}"] == records[f"step {step}"] for step in range(back_to[0] + 1, KILLED_AT))
    # Far from the limit on both sides, so that rounding on another processor does not change which steps are skipped.
    limit = max(float(r["skipped"].split()[-1]) for r in skipped)
    assert min(r["grad_norm"] for r in skipped) > 5 * limit
    assert max(r["grad_norm"] for r in records.values() if r["step"] > 64) < limit / 5
    assert list(found["samples"]) == [f"step_{step:08d}.txt" for step in (STEPS // 2, STEPS)]
    assert records[f"step {STEPS}"]["loss"] < 0.5 * records["step 1"]["loss"]
    assert records[f"step {STEPS}"]["val_loss"] < records["step 30"]["val_loss"]


# The numbers of two ranks are also in tests/e2e/test_reference.py.
@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, marks=() if s == "one_process" else pytest.mark.slow) for s in SETTINGS],
)
def test_the_run_gives_the_recorded_numbers(trainer, data_flags, tmp_path, setting):
    ranks, stage, file = SETTINGS[setting]
    command = tmp_path / "run", *FLAGS, *data_flags, f"--zero_stage={stage}"
    trainer.run(*command, ranks=ranks, fault=f"metrics#{KILLED_AT}=KILL", code=-9 if ranks == 1 else 1)
    printed = trainer.run(*command, ranks=ranks).stdout
    found, path, rewriting = numbers_of(tmp_path / "run"), GOLDEN / file, os.environ.get("RAWGPT_REWRITE_GOLDEN") == "1"
    check_events(found, printed)
    if not (rewriting or torch.backends.mkl.is_available()):
        pytest.skip("without MKL dropout draws other masks")
    if rewriting and stage != 1:
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert path.is_file(), f"{path} is missing; RAWGPT_REWRITE_GOLDEN=1 writes it"
    difference = first_difference(found, json.loads(path.read_text()))
    assert not difference, f"{setting}: {difference}"
