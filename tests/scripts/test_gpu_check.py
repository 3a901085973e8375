"""The check for GPU machines, as far as it goes without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_check.py"), *map(str, flags)]
    return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)


@pytest.mark.parametrize("only, count", [("half", 1), pytest.param("", 17, marks=pytest.mark.slow)])
def test_every_check_passes_on_the_cpu_with_tiny_shapes(tmp_path, only, count):
    output = tmp_path / "new" / "report.json"
    done = gpu_check("--device", "cpu", "--quick", f"--only={only}", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["passed"] and len(report["checks"]) == count and not report["throughput"]
    for check in report["checks"]:
        assert check["passed"] and check["figures"] and "error" not in check, check
        assert any(figure["at_most"] is not None for figure in check["figures"].values())
    if not only:
        assert any("train_gpt.py" in command for check in report["checks"] for command in check["commands"])
    assert {"hardware", "torch", "cuda", "python", "commit", "command", "seconds"} <= report.keys()


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = gpu_check("--output", tmp_path / "report.json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --device=cuda") and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())
