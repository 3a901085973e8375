"""HellaSwag and samples during training: they change no bit of the run, and their failure does not end it."""

import json
import signal
from pathlib import Path

import pytest

FAILING = str(Path(__file__).with_name("failing_evaluation.py"))
# GPT-2's vocabulary, which encodes the examples.
SHAPE = ["--vocab_size=50257", "--n_embd=16", "--num_iterations=6", "--val_max_steps=1", "--val_loss_every=2"]
SHAPE += ["--save_every_niter=4", "--sequence_length=64", "--batch_size=1"]
ENDINGS = [
    "goes on.",
    "rips tiles off the roof.",
    "[header] holds a cube.",
    "sings [title] and starts  pulling up roofing.",
]
METRICS = ["acc", "acc_norm"]
KEYS = ["hellaswag_acc", "hellaswag_acc_norm", "hellaswag_lm_eval_acc", "hellaswag_lm_eval_acc_norm"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("hellaswag") / "own.jsonl"
    rows = [
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": f"A man sits on roof number {i}." + " It is high." * (i % 7),
            "ctx_b": "he",
            "ctx": f"A man sits on roof number {i}." + " It is high." * (i % 7) + " he",
            "endings": ENDINGS[i % 4 :] + ENDINGS[: i % 4],
            "label": i % 3,
        }
        for i in range(1000)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hellaswag_flags(examples, limit=40):
    flags = [f"--hellaswag_data={examples}", "--hellaswag_every=2", f"--hellaswag_limit={limit}"]
    return [*flags, "--sample_every=3", "--sample_tokens=4"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_hellaswag_changes_no_bit_of_the_run(
    stage, trainer, command, examples, metrics, undisturbed, assert_same_run, tmp_path
):
    stage_flags = [*SHAPE, f"--zero_stage={stage}"]
    out = trainer.run(tmp_path, *stage_flags, *hellaswag_flags(examples), ranks=2).stdout
    assert_same_run(tmp_path, undisturbed(2, *stage_flags))
    records = metrics(tmp_path)
    assert [r["step"] for r in records if "hellaswag_acc" in r] == [2, 4, 6]
    # All ranks together get the result of the command for this checkpoint.
    options = ["--checkpoint", tmp_path, "--input", examples, "--limit=40", "--device=cpu"]
    command("eval/hellaswag.py", *options, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    accuracies = [found[style][metric]["value"] for style in ("completion", "lm_eval") for metric in METRICS]
    assert [records[-1][key] for key in KEYS] == accuracies
    assert out.count("HellaSwag completion: acc ") == 3 and (tmp_path / "hellaswag.png").is_file()


@pytest.mark.slow
def test_compiled_blocks_give_the_scores_of_eager_ones(trainer, examples, metrics, tmp_path):
    for name, compiled in (("eager", 0), ("compiled", 1)):
        trainer.run(tmp_path / name, *SHAPE, f"--compile={compiled}", *hellaswag_flags(examples), ranks=2)
    found = [[{k: r[k] for k in KEYS if k in r} for r in metrics(tmp_path / n)] for n in ("eager", "compiled")]
    assert found[0] == found[1] and any(found[0])


def test_a_failed_evaluation_is_reported_and_skipped(trainer, examples, metrics, undisturbed, tmp_path):
    flags = [*SHAPE, "--zero_stage=3"]
    lines, _ = undisturbed(2, *flags)
    (tmp_path / "samples" / "step_00000003.txt").mkdir(parents=True)  # a folder, so that the sample cannot be written
    err = trainer.run(tmp_path, *flags, *hellaswag_flags(examples), ranks=2, script=FAILING).stderr
    assert "warning: HellaSwag failed on rank 1 and is skipped: OSError: the disk is gone" in err
    assert "warning: sample failed on rank 0 and is skipped: IsADirectoryError" in err
    for what in ("validation", "HellaSwag", "sample"):
        assert f"warning: {what} failed on rank 0 and is skipped: RuntimeError: a kernel failed" in err
    assert [{k: v for k, v in r.items() if k != "val_loss"} for r in lines] == [
        {k: r[k] for k in ("step", "tokens", "loss", "lr", "grad_norm")} for r in metrics(tmp_path)
    ]
    assert ["val_loss" in r for r in metrics(tmp_path)] == [False, True, False, False, False, False]
    assert not any("hellaswag_acc" in r for r in metrics(tmp_path))


def test_a_signal_interrupts_hellaswag(trainer, examples, metrics, wait_for, tmp_path):
    flags = [*SHAPE, f"--hellaswag_data={examples}", "--hellaswag_every=4"]
    process = trainer.start(tmp_path, *flags, "--batch_size=1", python=trainer.warm_python)
    saved = tmp_path / "checkpoints" / "step_00000004"
    assert wait_for(saved.is_dir, process)  # the evaluation of a thousand examples comes next
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 4
    if metrics(tmp_path)[-1]["step"] == 3:  # interrupted in the evaluation, otherwise before it
        assert not (tmp_path / "checkpoints" / "step_00000005").exists()
    trainer.run(tmp_path, *flags, "--hellaswag_limit=3")
    assert [r["step"] for r in metrics(tmp_path) if "hellaswag_acc" in r] == [4, 6]


def test_mistakes_are_found_before_anything_is_written(trainer, examples, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(examples.read_text().splitlines()[0].replace("ctx_b", "ctx_c"))
    out = tmp_path / "run"
    for flags, message in (
        (["--hellaswag_every=1", "--tokenizer=none"], "--hellaswag_every encodes text"),
        (["--hellaswag_every=1", "--vocab_size=251"], "--vocab_size=251 does not fit tokenizer gpt2"),
        (["--hellaswag_every=1", f"--hellaswag_data={tmp_path}/no.jsonl"], "--hellaswag_data="),
        (["--hellaswag_every=1", f"--hellaswag_data={broken}"], "broken.jsonl, line 1: no field 'ctx_b'"),
    ):
        done = trainer.run(out, *SHAPE, *flags, code=2)
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
        assert not out.exists()
