"""What the tests of evaluation share: checkpoints and a Hugging Face folder made once, and the commands run here."""

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
    """A checkpoint of step 1 in the run directory `folder`, its weights such that they tell tokens and places apart."""
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
    """A run directory with a model of the counting shards' 251 tokens, which has no tokenizer, and of 32 positions."""
    flags = ["--n_layer=2", "--vocab_size=251", "--sequence_length=32"]
    return save_untrained(tmp_path_factory.mktemp("run"), *flags, tokenizer="gpt2")  # as a run by default says


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory):
    """One of GPT-2's vocabulary, and of 24 positions."""
    flags = ["--n_layer=1", "--vocab_size=50257", "--sequence_length=24"]
    return save_untrained(tmp_path_factory.mktemp("text"), *flags, tokenizer="gpt2")


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.3)


@pytest.fixture(scope="session")
def gpt_of():
    return lambda run: load_model(run, torch.device("cpu"))[0]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A tiny GPT-2 of transformers, of 20 positions, with a byte-level tokenizer of its own."""
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
    """Runs a command in this process and returns what it prints."""

    def run(module, *flags):
        args = module.parser().parse_args([*map(str, flags), "--device=cpu"])
        getattr(module, "check", cli.check)(args)
        capsys.readouterr()
        module.main(args)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def plain_losses():
    """What one forward gives of a row by itself: the loss of each token but the first, and whether it is likeliest."""

    @torch.no_grad()
    def losses(model, ids):
        logits = model(torch.tensor([ids[:-1]]))
        logits = getattr(logits, "logits", logits)[0].double()
        targets = torch.tensor(ids[1:])
        return -logits.log_softmax(-1)[range(len(targets)), targets], logits.argmax(-1) == targets

    return losses
