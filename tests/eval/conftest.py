"""Fixtures of the evaluation tests: checkpoints, a Hugging Face folder, and commands that run in this process."""

from __future__ import annotations

import pytest
import torch

from cfg.config import load_config
from eval import cli
from model.formats.pretrained import load_model
from model.gpt import GPT, init_weights
from train.checkpoint_writer import CheckpointWriter
from train.optim import make_optimizer
from util.ranks import Ranks

CORPUS = ["the cat sat on the mat, the dog on the log; and so on\n", "naïve 東京 “quotes” — 12 345\n"]


def save_untrained(folder, *flags, tokenizer="none"):
    """Saves a checkpoint of step 1, with weights for which tokens and positions matter."""
    common = ["--n_head=2", "--n_embd=16", f"--output_dir={folder}", "--device=cpu"]
    config = load_config([*common, *flags], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    shake(model)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    CheckpointWriter(config, ranks).save(1, model, make_optimizer(model, config, 1), {"tokenizer": {"name": tokenizer}})
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A run directory of a model with 32 positions and the 251 tokens of the counting shards, without a tokenizer."""
    flags = ["--n_layer=2", "--vocab_size=251", "--sequence_length=32"]
    return save_untrained(tmp_path_factory.mktemp("run"), *flags, tokenizer="gpt2")  # the default of a run


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory):
    """A run directory of a model with GPT-2's vocabulary and 24 positions."""
    flags = ["--n_layer=1", "--vocab_size=50257", "--sequence_length=24"]
    return save_untrained(tmp_path_factory.mktemp("text"), *flags, tokenizer="gpt2")


@torch.no_grad()
def shake(model):
    """Adds noise to all weights."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.3)


@pytest.fixture(scope="session")
def gpt_of():
    return lambda run: load_model(run, torch.device("cpu"))[0]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A folder with a tiny GPT-2 of transformers with 20 positions, and a byte-level tokenizer."""
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=20, n_embd=16, n_layer=1, n_head=2))
    shake(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(capsys):
    """Runs a command in this process and returns its output."""

    def run(module, *flags):
        args = module.parser().parse_args([*map(str, flags), "--device=cpu"])
        getattr(module, "check", cli.check)(args)
        capsys.readouterr()
        module.main(args)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def plain_losses():
    """Returns the loss of each token of a row except the first, and whether it is the most likely, from one forward."""

    @torch.no_grad()
    def losses(model, ids):
        logits = model(torch.tensor([ids[:-1]]))
        logits = getattr(logits, "logits", logits)[0].double()
        targets = torch.tensor(ids[1:])
        return -logits.log_softmax(-1)[range(len(targets)), targets], logits.argmax(-1) == targets

    return losses
