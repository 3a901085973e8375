"""Published results for comparison, each with its source. None: no reliable source was found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """HellaSwag accuracy on all 10,042 validation examples, zero-shot, in both styles of eval/hellaswag.py."""

    name: str
    acc: float | None
    acc_norm: float | None
    lm_eval_acc: float | None
    lm_eval_acc_norm: float | None


# 124M and XL: the header of dev/data/hellaswag.py in karpathy/llm.c. It gives the results of the script and of
# lm-evaluation-harness. Medium and large: dev/vislog.ipynb in karpathy/llm.c, with results of the trainer in C. It has
# 0.2945 for 124M and 0.4889 for XL, so its results may be 0.001 lower than the script's.
# Leaderboard results of these models are 10-shot and not comparable.
GPT2 = (
    Reference("GPT-2 124M", 0.2859, 0.2955, 0.2892, 0.3114),
    Reference("GPT-2 355M", None, 0.375224, None, None),
    Reference("GPT-2 774M", None, 0.431986, None, None),
    Reference("GPT-2 1558M", 0.3842, 0.4893, 0.4004, 0.5089),
)

# Style → the reference lines of its curve in hellaswag.png.
GPT2_ACC_NORM = {
    "completion": {r.name: r.acc_norm for r in GPT2 if r.acc_norm is not None},
    "lm_eval": {r.name: r.lm_eval_acc_norm for r in GPT2 if r.lm_eval_acc_norm is not None},
}


@dataclass(frozen=True)
class LambadaReference:
    """Last-word accuracy and perplexity on the 5,153 passages of OpenAI's LAMBADA, as in lm-evaluation-harness."""

    name: str
    accuracy: float
    perplexity: float


# Two independent runs of lm-evaluation-harness agree in all digits: its issue #2159 (version 1 of the task), and
# discussion 90 of openai-community/gpt2 on the Hugging Face hub. The paper's 0.4599 (perplexity 35.13) counts
# differently, see issue 131 of openai/gpt-2.
LAMBADA_GPT2 = (LambadaReference("GPT-2 124M", 0.3256, 40.0554),)
