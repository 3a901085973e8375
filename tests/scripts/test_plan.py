"""scripts/plan.py: estimates, recommendations and user errors."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cfg.config import load_config
from scripts import plan
from train.memory import planned_bytes
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def answer(capsys):
    """Runs the command in this process and returns its output."""

    def run(command_line):
        plan.main(*plan.parse(shlex.split(command_line)))
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys):
    """Runs the command in this process and returns its error message."""

    def run(command_line):
        with pytest.raises(UserError) as caught:
            plan.main(*plan.parse(shlex.split(command_line)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def recommended(out):
    """Returns the launcher, the Config and the number of ranks of the recommended command."""
    launch, _, flags = out.splitlines()[-1].partition(" train_gpt.py")
    ranks = 1
    for number in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", launch):
        ranks *= int(number)
    return launch, load_config(shlex.split(flags), ranks), ranks


@pytest.mark.parametrize(
    "command_line",
    [
        "--cfg=llama3-8b --gpus=64",
        "--cfg llama3-8b --gpus 8 --price 2.5",
        "--cfg=llama3-8b --gpus=1",
        "--cfg=llama3-8b --gpus=16 --zero_stage 3 --batch_size=1 --memory_gb=40",
        "--cfg=mistral-7b --gpu=h200 --gpus=32 --sequence_length=2048",
        "--cfg=gpt2-1558m --gpu=A100 --gpus=8",
        "--cfg=gpt2-350m --gpu=T4 --gpus=4 --tokens=1e9",
        "--cfg=gpt2-774m --gpu=L4 --gpus=8",
        "--gpus=1",
        "--cfg=gpt2-774m --gpus=8 --memory_gb=24 --compile=model",
    ],
)
def test_the_recommended_command_fits(answer, command_line):
    out = answer(command_line)
    args, flags = plan.parse(shlex.split(command_line))
    launch, config, ranks = recommended(out)
    assert ranks == args.gpus and ("torchrun" in launch) == (ranks > 1)
    assert planned_bytes(config, ranks, plan.capacity(args)).peak <= plan.usable_bytes(plan.capacity(args))
    for name, value in plan.parse_flags(flags).items():  # the command has the given flags
        assert str(getattr(config, name)) == value
    if args.tokens:
        assert 0 <= config.num_iterations * config.total_batch_size - args.tokens < config.total_batch_size
    assert (args.gpu == "T4") == (config.dtype == "float16")


def test_a_gpu_without_bfloat16_gets_a_float32_residual_stream(answer):
    _, config, _ = recommended(answer("--cfg=gpt2-124m --gpu=T4 --gpus=4 --residual_dtype=bfloat16"))
    assert (config.dtype, config.residual_dtype) == ("float16", "float32")


def test_a_model_compiled_as_a_whole_is_not_sharded(answer):
    rows = [re.split(r"  +", line) for line in answer("--cfg=gpt2-124m --gpus=8 --compile=model").splitlines()]
    assert {row[0] for row in rows if len(row) == len(plan.HEAD)} == {"stage", "0", "1"}


def test_time_and_cost_follow_from_the_flops(answer):
    out = answer("--cfg=llama3-8b --gpus=64 --price=2 --mfu=0.5 --tokens=1e11")
    # The PaLM formula: 6 × (N - V·C) + 12·L·C·T per token; 989 TFLOP/s.
    flops = 6 * (8_030_261_248 - 128256 * 4096) + 12 * 32 * 4096 * 8192
    tokens = -(-(10**11) // 4194304) * 4194304
    hours = tokens * flops / (64 * 989e12 * 0.5) / 3600
    assert f"{4194304 * flops:.3g} FLOPs per step" in out
    assert f"{hours / 24:.3g} days" in out and f"{hours * 64:,.0f} GPU hours, {hours * 128:,.0f} for 2" in out
    assert "4,194,304 tokens" in out and "8,030,261,248 parameters" in out
    assert "for" not in answer("--cfg=llama3-8b --gpus=64").splitlines()[2]  # no cost without a price


def test_every_strategy_has_a_line(answer):
    rows = [re.split(r"  +", line) for line in answer("--cfg=llama3-8b --gpus=16").splitlines() if line[:1].isdigit()]
    rows = [row for row in rows if len(row) == len(plan.HEAD)]
    strategies = {tuple(row[:3]) for row in rows}
    assert len(rows) == len(strategies) == (2 + 4 * 2) * 3
    assert {row[0] for row in rows} == {"0", "1", "2", "2 × 2", "3", "3 × 2"}
    for row in rows:
        parts, peak = [float(cell) for cell in row[4:10]], float(row[10])
        assert max(parts) <= peak <= sum(parts) + 0.3  # rounding
        assert (row[11] == "yes") == (peak <= 74.5) and (row[12] == "none") <= (row[11] == "no")


def test_the_largest_micro_batch_fits_and_the_next_larger_one_does_not(answer):
    args, flags = plan.parse(["--cfg=llama2-7b", "--gpus=16", "--zero_stage=3"])
    base = load_config(flags, 16)
    checked = 0
    for setting in (s for ways in plan.explore(base, {"zero_stage": 3}, args) for s in ways if s.largest):
        rows = base.total_batch_size // (base.sequence_length * 16)
        for size in (b for b in range(1, rows + 1) if rows % b == 0):
            config = setting.config.model_copy(update={"batch_size": size})
            peak = planned_bytes(config, 16, plan.capacity(args)).peak
            if size >= setting.largest:
                assert (peak <= plan.usable_bytes(plan.capacity(args))) == (size == setting.largest)
                checked += 1
    assert checked > 20


def test_flags_of_the_strategy_narrow_the_choice(answer):
    out = answer(
        "--cfg=llama3-8b --gpus=16 --zero_stage=3 --replicas=4 --cpu_offload=1 --activation_checkpointing=block"
    )
    rows = [line for line in out.splitlines() if line.startswith("3 × 4")]
    assert len(rows) == 1 and "block" in rows[0]
    assert recommended(out)[1].replicas == 4


@pytest.mark.parametrize(
    "command_line, words",
    [
        ("--cfg=llama-8b", ["--cfg=llama-8b", "llama3-8b"]),
        ("--gpu=H10", ["--gpu=H10", "'H100'"]),
        ("--gpu=potato", ["--gpu=potato", "A100"]),
        ("--gpus=0", ["--gpus=0", "at least 1"]),
        ("--gpus=12", ["--gpus=12", "--gpus_per_node=8"]),
        ("--gpus=many", ["--gpus"]),
        ("--gpus_per_node=0", ["--gpus_per_node=0"]),
        ("--mfu=1.5", ["--mfu=1.5"]),
        ("--mfu=nan", ["--mfu=nan"]),
        ("--price=-1", ["--price=-1"]),
        ("--tokens=0", ["--tokens=0"]),
        ("--memory_gb=inf", ["--memory_gb=inf"]),
        ("--cfg=llama3-8b --gpus=7", ["--total_batch_size=4194304", "7", "nearest"]),
        ("--cfg=llama3-8b --gpus=7 --replicas=2", ["--replicas=2", "7"]),
        ("--cfg=gpt2-124m --batch_size=5", ["--total_batch_size", "5"]),
        ("--flash=0", ["--flash=0"]),
        ("--num_epochs=2", ["--num_epochs", "--tokens"]),
        ("--zero_stagee=1", ["zero_stage"]),
        ("--cfg=gpt2-124m --gpus=1 --zero_stage=1", ["no strategy"]),
    ],
)
def test_a_user_error_names_the_flag_and_a_remedy(refusal, command_line, words):
    message = refusal(command_line)
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_if_nothing_fits_it_suggests_changes_that_fit(refusal, answer, capsys):
    message = refusal("--cfg=llama3-8b --gpu=A100 --gpus=8 --zero_stage=0")
    assert "leaving out --zero_stage" in message
    answer("--cfg=llama3-8b --gpu=A100 --gpus=8")
    message = refusal("--cfg=llama3-8b --gpu='RTX 3080' --gpus=8")
    ways = message.split("Try: ")[1].split("; ")
    assert len(ways) >= 2
    for way in ways:
        given = {"--cfg": "llama3-8b", "--gpu": "'RTX 3080'", "--gpus": "8"} | dict([way.split("=")])
        assert "recommended" in answer(" ".join(f"{k}={v}" for k, v in given.items()))


def test_the_tables_in_the_docs_equal_the_output_of_their_commands(answer):
    text = (ROOT / "docs" / "memory.md").read_text()
    quoted = re.findall(r"`python scripts/plan\.py ([^`]*--markdown)`[^|]*?\n\n((?:\|.*\n)+)", text)
    assert quoted
    for command_line, table in quoted:
        assert answer(command_line) == table, "docs/memory.md differs from the output of its command: update it"


def test_help_does_not_import_torch_and_user_errors_have_exit_code_2(imports_of):
    command = [sys.executable, str(ROOT / "scripts/plan.py")]
    done, imported = imports_of("scripts/plan.py", "--help")
    assert done.returncode == 0 and "--gpus" in done.stdout and not imported & {"torch", "numpy"}
    done = subprocess.run([*command, "--gpu=H10"], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: --gpu=H10.*\n", done.stderr) and not done.stdout
    done = subprocess.run([*command, "--cfg=gpt2-124m"], capture_output=True, text=True)
    assert done.returncode == 0 and "recommended" in done.stdout, done.stderr
