"""Training that starts from a Hugging Face model, in every strategy."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

VOCAB = 251  # the vocabulary of the tiny shards; the shape is that of the tiny runs
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def folder_of(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return folder, folder_of(LlamaConfig(**SHAPE, tie_word_embeddings=True), folder)


def near(ours, reference, limit=5e-6):
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=0, abs=limit)


@pytest.fixture(scope="module")
def one_process(trainer, trace, llama, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one") / "run"
    trainer.run(output_dir, f"--init_from=hf:{llama[0]}", "--shuffle=0", "--batch_size=8")
    return output_dir


def test_the_first_loss_is_that_of_transformers(trace, one_process, llama):
    tokens = np.arange(20_000)[3000:] % VOCAB
    rows = torch.from_numpy(np.stack([tokens[i * 32 : i * 32 + 33] for i in range(8)]))
    with torch.no_grad():
        logits = llama[1](rows[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
    losses = [record["loss"] for record in trace(one_process)]
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "flags",
    [
        ["--zero_stage=0"],
        pytest.param(["--zero_stage=1"], marks=pytest.mark.slow),
        pytest.param(["--zero_stage=2"], marks=pytest.mark.slow),
        ["--zero_stage=3", "--cpu_offload=1", "--activation_checkpointing=block"],
    ],
    ids=["stage0", "stage1", "stage2", "stage3-offload-recompute"],
)
def test_every_strategy_trains_the_model_alike(trainer, trace, one_process, llama, tmp_path, flags):
    trainer.run(tmp_path / "run", f"--init_from=hf:{llama[0]}", "--shuffle=0", "--batch_size=4", *flags, ranks=2)
    near(trace(tmp_path / "run"), trace(one_process))


@pytest.mark.slow
def test_a_run_resumes_and_another_run_can_start_from_it(trainer, trace, one_process, llama, tmp_path, parameters_of):
    flags = [f"--init_from=hf:{llama[0]}", "--shuffle=0", "--batch_size=8"]
    trainer.run(tmp_path / "run", *flags, "--max_minutes=1e-9")
    done = trainer.run(tmp_path / "run", *flags)
    assert "resuming from" in done.stdout
    assert trace(tmp_path / "run") == trace(one_process)  # ==: all digits
    last = parameters_of(tmp_path / "run" / "checkpoints" / "step_00000015")
    (tmp_path / "run/checkpoints/step_00000020/state.json").write_text("{")
    begin = [f"--init_from={tmp_path / 'run'}", "--num_iterations=1", "--learning_rate=1e-30"]
    done = trainer.run(tmp_path / "next", *begin, ranks=2)
    assert done.stdout.count("step_00000020 is skipped") == 1  # rank 0 chooses and reports it
    first = parameters_of(tmp_path / "next")
    assert all((last[name] - first[name]).abs().max() < 1e-12 for name in last)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [0, 1])
def test_a_sliding_window_trains_and_is_saved_in_the_manifest(trainer, trace, tmp_path, compile):
    folder_of(MistralConfig(**SHAPE, sliding_window=5), tmp_path / "hf")
    common = [f"--init_from=hf:{tmp_path / 'hf'}", "--num_iterations=4", "--sample_every=4", "--sample_tokens=9"]
    trainer.run(tmp_path / "one", *common, "--batch_size=4", "--flash=0")
    trainer.run(tmp_path / "two", *common, "--zero_stage=3", f"--compile={compile}", ranks=2)
    near(trace(tmp_path / "two"), trace(tmp_path / "one"))
    manifest = json.loads((tmp_path / "two/checkpoints/step_00000004/manifest.json").read_text())
    assert manifest["config"]["sliding_window"] == 5


def test_mistakes_are_one_line(trainer, llama, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (f"--init_from=hf:{tmp_path / 'nowhere'}", "no such folder"),
        (f"--init_from=hf:{tmp_path / 'empty'}", "config.json"),
        (f"--init_from={llama[0]}", "contains no checkpoint"),
        ("--init_from=gpt2", "other models are named with hf:"),
        ("--init_from=llmc:nowhere.bin", "no such file"),
    ]
    for flag, said in cases:
        done = trainer.run(tmp_path / "run", flag, code=2)
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and said in done.stderr
    done = trainer.run(tmp_path / "run", f"--init_from=hf:{llama[0]}", "--n_layer=3", code=2)
    assert "--n_layer=3, but the model of --init_from has 2; leave the flag out" in done.stderr
    (llama[0] / "model.safetensors").rename(tmp_path / "moved")
    try:
        done = trainer.run(tmp_path / "run", f"--init_from=hf:{llama[0]}", code=2)
    finally:
        (tmp_path / "moved").rename(llama[0] / "model.safetensors")
    assert "neither model.safetensors nor" in done.stderr and not (tmp_path / "run" / "checkpoints").exists()
