"""Logs of nanoGPT, llm.c and Weights & Biases become runs whose steps and tokens are counted as rawgpt counts them."""

import math

import pytest

from scripts.reporting.others import import_runs
from util.errors import UserError

NANOGPT = """\
tokens per iteration will be: 491,520
number of parameters: 123.59M
step 0: train loss 10.9910, val loss 10.9899
iter 0: loss 10.9892, time 20000.00ms, mfu -100.00%
iter 10: loss 9.5000, time 500.00ms, mfu 35.50%
iter 20: loss nan, time 500.00ms, mfu 35.00%
step 20: train loss 8.9000, val loss 8.8000
"""
LLMC = """\
s:0 tel:11.0152
s:0 eval:0.2492
s:0 trl:11.0152 lr:0.000001 norm:15.43
s:1 trl:10.9000 lr:0.000002 norm:12.00
s:2 tel:10.8000
"""
CHART = """\
"Step","quick - val/loss","quick - val/loss__MIN","quick - val/loss__MAX","slow - val/loss"
0,5,5,5,6
10,4.5,4.5,4.5,
"""
HISTORY = "_step,train/loss,val/loss,lr,mfu,_runtime,name\n1,9.5,,0.001,-100,3,x\n2,9.0,8.9,0.001,42.5,6,x\nbroken\n"


def load(tmp_path, kind, text, tokens=None):
    path = tmp_path / "log.txt"
    path.write_text(text)
    return import_runs([f"{kind}:{path}"], tokens)


def test_nanogpt(tmp_path):
    [run] = load(tmp_path, "nanogpt", NANOGPT)
    assert run.name == "log" and run.source == "nanoGPT" and run.fact("parameters") == 123_590_000
    assert run.table.steps.tolist() == [0, 1, 11, 20, 21]  # iter 0 is the loss before the first update: step 1
    assert run.table.points("val_loss")[1].tolist() == [10.9899, 8.8]
    assert run.table.points("loss")[0].tolist() == [1, 11] and math.isnan(run.table.column("loss")[-1])
    assert run.table.column("tokens").tolist() == [491_520 * k for k in (0, 1, 11, 20, 21)]
    assert run.table.points("mfu")[1].tolist() == [0.355, 0.35]
    assert run.table.column("elapsed_s").tolist() == [0, 20, 25, 25, 30]
    assert run.table.points("tok_per_s")[1].tolist() == [24576, 983040, 983040]


def test_llmc(tmp_path):
    [run] = load(tmp_path, "llmc", LLMC, tokens=524_288)
    assert run.table.steps.tolist() == [0, 1, 2]
    assert run.table.points("val_loss")[0].tolist() == [0, 2] and run.table.points("hellaswag_acc_norm")[
        1
    ].tolist() == [0.2492]
    assert run.table.points("loss")[0].tolist() == [1, 2] and run.table.points("grad_norm")[1].tolist() == [15.43, 12.0]
    assert run.table.column("tokens").tolist() == [0, 524_288, 1_048_576]
    assert "tokens" not in load(tmp_path, "llmc", LLMC)[0].table.columns


def test_a_chart_of_wandb_has_several_runs(tmp_path):
    quick, slow = load(tmp_path, "wandb", CHART)
    assert (quick.name, slow.name) == ("quick", "slow")
    assert quick.table.points("val_loss")[1].tolist() == [5.0, 4.5] and slow.table.points("val_loss")[1].tolist() == [
        6.0
    ]


def test_a_history_of_wandb(tmp_path):
    [run] = load(tmp_path, "wandb", HISTORY, tokens=1000)
    assert run.table.column("loss").tolist() == [9.5, 9.0] and run.table.points("val_loss")[1].tolist() == [8.9]
    assert run.table.points("mfu")[1].tolist() == [0.425] and run.table.column("elapsed_s").tolist() == [3, 6]
    assert run.table.column("tokens").tolist() == [1000, 2000]


@pytest.mark.parametrize(
    "value, reason",
    [
        ("log.txt", "must be FORMAT:FILE; give one of nanogpt, llmc, wandb"),
        ("nanogtp:log.txt", "did you mean nanogpt:FILE?"),
        ("nanogpt:", "must be FORMAT:FILE"),
        ("nanogpt:/missing/log.txt", "No such file"),
        ("llmc:{log}", "has no line that llm.c writes"),
        ("wandb:{log}", "has no column of steps"),
    ],
)
def test_mistakes_are_one_line(tmp_path, value, reason):
    (tmp_path / "log").write_text(NANOGPT)
    with pytest.raises(UserError, match="^--import=") as error:
        import_runs([value.format(log=tmp_path / "log")], None)
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["nanogpt", "llmc", "wandb"])
def test_any_bytes_are_a_run_or_one_line(tmp_path, kind):
    for text in (
        b"",
        b"\x00\xff" * 50,
        b"s:1 trl:x\niter 1: loss ., time .ms",
        b"step,loss\n" + b'"' * 300 + b"x" * 200_000,
        b"Step,loss\n1e999,2\n",
    ):
        (tmp_path / "log").write_bytes(text)
        with pytest.raises(UserError, match="^--import="):
            import_runs([f"{kind}:{tmp_path / 'log'}"], None)
