"""scripts/bench/gpu_check.sh on a machine without a GPU. The checks themselves are in tests/gpu."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*flags: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "bench" / "gpu_check.sh"), *map(str, flags)]
    return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_rehearsal_writes_a_report_of_the_chosen_checks(tmp_path):
    output = tmp_path / "new" / "report.json"
    done = gpu_check("--device", "cpu", "--only", "flash document", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["passed"] and len(report["checks"]) == 2 and not report["throughput"]
    for check in report["checks"]:
        assert check["passed"] and "error" not in check and "flash_attention_with_a_document_mask" in check["name"]
        assert all(0 <= figure["measured"] <= figure["at_most"] for figure in check["figures"].values())
        assert check["figures"].keys() == {"loss", "gradients"}
    assert {"hardware", "torch", "cuda", "python", "commit", "command", "seconds"} <= report.keys()


@pytest.mark.slow
def test_a_check_that_starts_after_the_time_limit_fails(tmp_path):
    output = tmp_path / "report.json"
    assert gpu_check("--device=cpu", "--only=half", "--minutes=1e-9", f"--output={output}").returncode == 1
    report = json.loads(output.read_text())
    assert not report["passed"] and "minutes are over" in report["checks"][0]["error"]


@pytest.mark.slow
def test_a_missing_gpu_is_an_error_of_one_line(tmp_path):
    done = gpu_check("--output", tmp_path / "report.json")
    assert done.returncode == 2
    assert "error: --device=cuda: this machine has no CUDA device" in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())
