"""The memory use of a process."""

import subprocess
import sys


def test_memory_is_this_process_alone():
    """A child of a large process must not be charged with its parent's size."""
    ballast = bytearray(b"x" * 2**30)
    code = "import torch; from util.device import peak_memory; print(peak_memory(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(child.stdout) < len(ballast)
