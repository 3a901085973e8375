"""A score does not depend on what shares a row, a batch or a rank with the continuation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg.config import load_config
from eval.scoring import (
    Request,
    ScoringModel,
    collate,
    gpt_forward,
    make_batches,
    score_in_steps,
    score_requests,
    to_rows,
)
from model.gpt import GPT, init_weights
from util.ranks import Ranks

VOCAB, LIMIT, CPU = 97, 24, torch.device("cpu")
GPT2 = []
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--n_kv_head=2", "--qk_norm=1"]
WINDOW = [*LLAMA, "--sliding_window=5", "--head_dim=12"]
FAMILIES = pytest.mark.parametrize(
    "flags", [GPT2, ["--flash=0", "--logit_softcap=5"], LLAMA, [*LLAMA, "--flash=0", "--tie_embeddings=0"], WINDOW]
)


def make(flags):
    shape = ["--n_layer=2", "--n_head=4", "--n_embd=32", f"--vocab_size={VOCAB}", f"--sequence_length={LIMIT}"]
    model = GPT(load_config([*shape, *flags], world_size=1)).eval()
    init_weights(model, 5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform, so that a wrong position or mask shows
    return model


def some_requests(count=14, longest=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def ids(n):
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    return [Request(ids(draw(1, longest)), [ids(draw(1, 5)) for _ in range(draw(1, 4))]) for _ in range(count)]


class SimulatedRanks(Ranks):
    """Ranks that run one after another. `gather` returns what the ranks so far gave, so the last rank gets all."""

    def gather(self, value):
        self.cpu_group.append(value)
        return self.cpu_group


def simulated_models(model, tokens=200, shared=True, world_size=1):
    gathered = []
    for rank in range(world_size):
        yield ScoringModel(
            gpt_forward(model), SimulatedRanks(rank, 0, world_size, CPU, gathered), LIMIT, tokens, shared
        )


@torch.no_grad()
def scores_of(model, requests, **options):
    return [score_requests(each, requests) for each in simulated_models(model, **options)][-1]


@torch.no_grad()
def one_by_one(model, requests):
    """(loss, greedy) of each continuation: one row, no batch, all logits, in float64."""
    found = []
    for request in requests:
        found.append([])
        for continuation in request.continuations:
            text = (request.context + continuation)[-LIMIT - 1 :]
            log_p = model(torch.tensor([text[:-1]]))[0].double().log_softmax(-1)[-len(continuation) :]
            loss = -log_p[range(len(continuation)), continuation].sum().item()
            found[-1].append((loss, log_p.argmax(-1).tolist() == continuation))
    return found


def assert_equal(scores, expected):
    for ours, theirs in zip(scores, expected, strict=True):
        assert [s.loss for s in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-5, abs=1e-5)
        assert [s.greedy for s in ours] == [greedy for _, greedy in theirs]


@FAMILIES
def test_scores_equal_those_of_each_continuation_alone(flags):
    model = make(flags)
    requests = some_requests() + some_requests(6, longest=40, seed=1)  # some are cropped
    expected = one_by_one(model, requests)
    likeliest = requests[0].context + [0]
    for _ in range(2):  # a greedy continuation
        likeliest[-1] = int(model(torch.tensor([likeliest[:-1]]))[0, -1].argmax())
        likeliest.append(0)
    requests.append(Request(requests[0].context, [likeliest[len(requests[0].context) : -1], [3]]))
    expected += one_by_one(model, requests[-1:])
    assert expected[-1][0][1]
    for tokens in (1, 60, 1000):
        assert_equal(scores_of(model, requests, tokens=tokens), expected)
    assert_equal(scores_of(model, requests, shared=False), expected)


def test_any_number_of_ranks_gives_the_same_digits():
    model, requests = make(GPT2), some_requests()
    alone = scores_of(model, requests)
    for world_size in (2, 3, 7, 50):  # at last more than there are batches
        assert scores_of(model, requests, world_size=world_size) == alone


def test_all_ranks_make_the_same_number_of_forward_passes():
    requests, model = some_requests(), make(GPT2)
    steps = [list(score_in_steps(each, requests)) for each in simulated_models(model, tokens=60, world_size=4)]
    rows = sum(sum(1 for _ in to_rows(i, r, LIMIT, True)) for i, r in enumerate(requests))
    assert all(each == steps[0] and sum(each) == rows for each in steps)


def test_scores_in_bfloat16_are_close():
    model, requests = make(GPT2), some_requests()
    exact = scores_of(model, requests)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = scores_of(model, requests)
    difference = [
        abs(a.loss - b.loss) / a.loss for x, y in zip(exact, near, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert 0 < max(difference) < 0.05


ids = st.lists(st.integers(0, 9), min_size=1, max_size=30)
requests_of_any_size = st.builds(Request, ids, st.lists(ids, min_size=1, max_size=5))


@given(requests_of_any_size, st.integers(1, 40), st.booleans())
def test_every_token_is_predicted_once_from_as_much_context_as_fits(request, limit, shared):
    predicted = {}
    for row in to_rows(0, request, limit, shared):
        whole = len(row.continuations) > 1 or len(request.continuations) == 1
        assert row.context and (whole or row.length <= limit)
        for span, tokens in zip(row.spans, row.continuations, strict=True):
            number, first = span.continuation, span.start
            before = request.context + request.continuations[number][:first]
            assert before[len(before) - len(row.context) :] == row.context
            assert len(row.context) - 1 + len(tokens) <= limit
            assert row.context == before or len(row.context) - 1 + len(tokens) == limit
            for i, token in enumerate(tokens):
                assert (number, first + i) not in predicted
                predicted[number, first + i] = token
    assert predicted == {(i, j): t for i, c in enumerate(request.continuations) for j, t in enumerate(c)}


@given(st.lists(requests_of_any_size, min_size=1, max_size=12), st.integers(1, 300))
def test_batches_contain_every_row_once_and_none_is_too_large(requests, tokens):
    rows = [row for i, request in enumerate(requests) for row in to_rows(i, request, 1000, True)]
    batches = make_batches(rows, tokens)
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    lengths = [row.length for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * batch[0].length <= tokens or len(batch) == 1 for batch in batches)


@given(st.lists(requests_of_any_size, min_size=1, max_size=5))
@settings(max_examples=40)
def test_a_position_attends_to_its_context_and_to_its_own_continuation(requests):
    rows = [row for i, request in enumerate(requests) for row in to_rows(i, request, 1000, True)]
    batch = collate(rows, CPU)
    if batch.mask is None:
        assert all(len(row.continuations) == 1 for row in rows)
        return
    for b, row in enumerate(rows):
        at = len(row.context) - 1
        for continuation in row.continuations:
            text = row.context + continuation
            for place in range(at, at + len(continuation)):
                seen = batch.idx[b][batch.mask[b, 0, place]].tolist()
                assert seen == text[: len(row.context) + place - at]
                assert batch.targets[b, place] == continuation[place - at]
                assert batch.positions[b][batch.mask[b, 0, place]].tolist() == list(range(len(seen)))
            at += len(continuation)
    assert batch.mask.any(-1).all()  # softmax needs at least one position


def test_an_empty_context_or_continuation_is_refused():
    for request in (Request([], [[1]]), Request([1], [[1], []])):
        with pytest.raises(ValueError, match="empty"):
            list(to_rows(0, request, 10, True))
