"""Losses and gradients of one batch, computed in two ways on this device."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from data.documents import document_positions
from model import loss as chunked_loss
from model.loss import IGNORE_INDEX
from tests.gpu.conftest import FAMILIES
from train.parallel import parallelize
from util.device import peak_memory
from util.ranks import Ranks

pytestmark = pytest.mark.gpu
# Limits of the relative difference of the loss, and of |a - b| / |b| for the gradients of the worst parameter.
# bfloat16 has 8 bits, and the two ways round at different places.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 1e-1)}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", LIMITS)
# Compilation takes longer than all other checks together, so each family and each dtype is compiled once.
each_compiled = pytest.mark.parametrize("family, dtype", [("gpt2", "bfloat16"), ("llama", "float32")])


def gradients(config, full_logits=False):
    """Returns the mean loss and the gradient of every parameter at the initial weights, float64 on the CPU.

    The batch is random. Every seventh target is ignored. With --doc_mask documents are a quarter of a row long on
    average. With `full_logits` the loss is the plain F.cross_entropy.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    model = parallelize(config, Ranks(0, 0, 1, device)).gpt
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, ::7] = IGNORE_INDEX
    # One in sequence_length / 4 tokens counts as the end of a document.
    positions = document_positions(idx % (config.sequence_length // 4), 0) if config.doc_mask else None
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        if full_logits:
            logits = model(idx, positions=positions).float().flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
        else:
            loss_sum, count = model(idx, targets, positions=positions)
            loss = loss_sum / count
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.cpu().double() for name, tensor in found.items()}


@pytest.fixture
def several_chunks(bench):
    """Flags for a batch whose logits take several chunks, also on a large GPU, where one chunk may hold 2^30."""
    elements = 2**18 if bench.quick else 2**27
    with mock.patch.dict(chunked_loss.CHUNK_ELEMENTS, cpu=elements, cuda=elements):
        yield "" if bench.quick else "--batch_size=32"


@pytest.fixture
def compare(bench, figures):
    def check(family, dtype, ours, theirs=None, full_logits=False):
        """Compares loss and gradients under the flags `ours` and `theirs` (default: the same flags)."""
        flags = [*FAMILIES[family].split(), f"--dtype={dtype}"]
        a = gradients(bench.config(*flags, *ours.split()))
        b = gradients(bench.config(*flags, *(ours if theirs is None else theirs).split()), full_logits)
        assert a.keys() == b.keys()
        differences = {name: ((a[name] - b[name]).norm() / b[name].norm()).item() for name in b}
        loss_limit, gradient_limit = LIMITS[dtype]
        loss = differences.pop("loss")
        worst = torch.tensor(list(differences.values())).max().item()  # NaN if one is
        figures({"loss": loss}, at_most=loss_limit)
        figures({"gradients": worst}, at_most=gradient_limit)

    return check


@pytest.mark.slow  # on the CPU tests/model/test_loss.py measures the largest tensor
def test_the_chunked_loss_needs_less_memory_than_full_logits(bench, several_chunks, figures):
    rows = "--batch_size=128" if bench.quick else several_chunks
    config, device = bench.config(rows, "--n_layer=1", "--dtype=bfloat16"), torch.device(bench.device)
    reset_peak_memory(bench.device)
    peaks = [peak_memory(device)]
    for full_logits in (False, True):  # the smaller peak first: on the CPU it is the peak of the process
        gradients(config, full_logits)
        peaks.append(peak_memory(device))
    chunked, full = (peak - peaks[0] for peak in peaks[1:])
    figures({"in chunks, MiB": chunked / 2**20, "full logits, MiB": full / 2**20})
    figures({"in chunks / full logits": chunked / full}, at_most=0.6)


def reset_peak_memory(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        pytest.skip("the peak of a process can be reset on Linux only")


@each_family
def test_this_device_computes_the_numbers_of_the_cpu(bench, compare, family):
    compare(family, "float32", f"--device={bench.device}", "--device=cpu")


@each_family
@each_dtype
def test_flash_attention_computes_the_numbers_of_plain_attention(compare, family, dtype):
    compare(family, dtype, "--flash=1", "--flash=0")


@each_dtype
def test_flash_attention_with_a_document_mask_computes_the_numbers_of_plain_attention(compare, dtype):
    compare("llama", dtype, "--doc_mask=1 --flash=1", "--doc_mask=1 --flash=0")


@each_family
@each_dtype
def test_the_chunked_loss_computes_the_numbers_of_full_logits(compare, several_chunks, family, dtype):
    compare(family, dtype, several_chunks, full_logits=True)


@pytest.mark.slow
@each_compiled
def test_compiled_blocks_and_loss_compute_the_numbers_of_eager_ones(compare, several_chunks, family, dtype):
    compare(family, dtype, f"--compile=1 {several_chunks}", f"--compile=0 {several_chunks}", full_logits=True)


@pytest.mark.slow
@each_compiled
def test_a_model_compiled_as_a_whole_computes_the_numbers_of_an_eager_one(compare, family, dtype):
    compare(family, dtype, "--compile=model", "--compile=0")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["--doc_mask=1", "--sliding_window=20"])
def test_a_compiled_mask_computes_the_numbers_of_a_plain_one(bench, compare, mask):
    """The compiled mask is FlexAttention on CUDA and a dense mask elsewhere."""
    compare("llama", "float32" if bench.quick else "bfloat16", f"{mask} --compile=1", f"{mask} --flash=0")
