"""Published figures to hold ours against, each with its source. None: no source was found that can be trusted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """HellaSwag accuracy on all 10,042 validation examples, zero-shot, in both scorings of eval/hellaswag.py."""

    name: str
    acc: float | None
    acc_norm: float | None
    lm_eval_acc: float | None
    lm_eval_acc_norm: float | None


# 124M and XL: all four figures stand in the head of karpathy/llm.c's dev/data/hellaswag.py (the script's own run, and
# what it reports of lm-evaluation-harness). Medium and large: dev/vislog.ipynb of the same repository, whose figures
# the trainer in C printed: its 124M is 0.2945 and its XL 0.4889, so they may be a thousandth lower than the script's.
# Leaderboard figures of these models are 10-shot, and do not compare.
GPT2 = (
    Reference("GPT-2 124M", 0.2859, 0.2955, 0.2892, 0.3114),
    Reference("GPT-2 355M", None, 0.375224, None, None),
    Reference("GPT-2 774M", None, 0.431986, None, None),
    Reference("GPT-2 1558M", 0.3842, 0.4893, 0.4004, 0.5089),
)

# Curve → its reference lines, as hellaswag.png draws them.
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


# Two runs of lm-evaluation-harness by different people agree in all digits: its issue #2159 (version 1 of the task),
# and discussion 90 of openai-community/gpt2 on the Hugging Face hub. The paper's 0.4599 (perplexity 35.13) counts
# otherwise, see issue 131 of openai/gpt-2.
LAMBADA_GPT2 = (LambadaReference("GPT-2 124M", 0.3256, 40.0554),)
