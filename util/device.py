"""The device to compute on, its name and its memory use."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from util.errors import UserError


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Returns the device for `wanted`: auto, cpu, cuda or mps. auto takes the first of cuda, mps, cpu that exists."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        raise UserError(f"--device={kind}: this machine has none; use --device=auto")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node asks for more than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes ever allocated on a CUDA device, otherwise the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux getrusage starts with the size that the parent process had at the fork; VmHWM (kB) does not.
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        return 1024 * int(text.split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
