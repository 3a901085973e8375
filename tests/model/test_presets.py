"""The presets of the larger models: published parameter counts to the last digit, and flags that fit together."""

import pytest
import torch

from cfg.config import PRESETS, load_config
from model.gpt import GPT
from train.optim import make_optimizer

# GPT-2: Radford et al. 2019, counted in the released weights. Llama and Mistral: the sums of the shapes in the released
# weights. code-1b and modern-* are rawgpt's: their comments must be right.
PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "code-1b": 1_174_841_344,
    "modern-124m": 162_129_408,
    "modern-350m": 404_916_224,
    "modern-1.5b": 1_520_090_880,
}
HIDDEN = {
    "modern-124m": 84_934_656,
    "modern-350m": 301_989_888,
    "modern-1.5b": 1_327_104_000,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_the_published_number_of_parameters_and_says_so(name):
    config = load_config([f"--cfg={name}"], world_size=1)
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == PARAMETERS[name]
    comment = (PRESETS / f"{name}.yaml").read_text().split("\nn_layer")[0]
    comment = comment.replace("\n# ", " ")
    assert name == "gpt2-124m" or f"{PARAMETERS[name]:,} parameters" in comment
    if name in HIDDEN:
        optimizer = make_optimizer(model, config, world_size=1)
        assert sum(p.numel() for g in optimizer.param_groups if g["parts"] for p in g["params"]) == HIDDEN[name]
        assert f"{HIDDEN[name]:,} are in hidden matrices" in comment


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_runs_on_one_node_and_on_eight(name):
    for world_size in (1, 8, 16, 32, 64):
        config = load_config([f"--cfg={name}"], world_size)
        assert config.warmup_iters < config.num_iterations / 10


@pytest.mark.parametrize("name", [name for name in PARAMETERS if not name.endswith("124m")])
def test_a_preset_trains_on_twenty_tokens_per_parameter_and_a_modern_one_on_ten(name):
    config, ratio = load_config([f"--cfg={name}"], world_size=8), 10 if name in HIDDEN else 20
    assert config.num_iterations * config.total_batch_size == pytest.approx(ratio * PARAMETERS[name], rel=1e-3)


def test_the_modern_preset_trains_on_half_of_the_tokens_of_gpt2():
    gpt2, modern = (load_config([f"--cfg={name}-124m"], world_size=8) for name in ("gpt2", "modern"))
    assert gpt2.num_iterations // 2 == modern.num_iterations and gpt2.total_batch_size == modern.total_batch_size


@pytest.mark.parametrize("name", ["modern-350m", "modern-1.5b", "modern-shakespeare"])
def test_a_modern_preset_has_the_model_and_optimizer_of_modern_124m(name):
    base, config = (load_config([f"--cfg={n}"], world_size=1).model_dump() for n in ("modern-124m", name))
    model = "positions norm norm_weight embedding_norm mlp bias qk_norm logit_softcap tie_embeddings embedding_std"
    optimizer = "optimizer matrix_lr scalar_lr beta1 beta2 adam_eps weight_decay warmup_iters"
    schedule = "schedule cooldown_frac learning_rate_decay_frac"
    for flag in f"{model} head_init zero_init {optimizer} {schedule}".split():
        assert config[flag] == base[flag], flag
    for flag in ("embedding_lr", "head_lr"):
        assert config[flag] == pytest.approx(base[flag] * (768 / config["n_embd"]) ** 0.5, rel=0.02), flag
