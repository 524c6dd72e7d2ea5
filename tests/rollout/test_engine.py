"""A request's tokens and the bits of its log-probs depend on its prompt, its parameters and the weights: on nothing else."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from kernels.model import ModelConfig
from kernels.ops import gumbel_argmax, vocab_logprob, vocab_nodes
from kernels.tree import WHOLE
from kernels.weights.digest import digest, slice_digests
from rollout.sampling import Completion, Request, SamplingParams
from tests.model.shapes import EIGHT, SHAPES, TINY, packed_logits, random_weights
from tests.rollout.scenarios import LIMITS, alone, bits, engine, flat_head, logprob_bits, requests


@pytest.fixture(scope="module")
def reference() -> list[Completion]:
    return alone(TINY, requests(TINY))


def naive(config: ModelConfig, request: Request, dtype: torch.dtype) -> Completion:
    """The whole sequence through the model again for every token, as the trainer lays it out."""
    weights = {p.name: w for p, w in random_weights(config)}
    asked, tokens, logprobs, reason = request.sampling, list(request.prompt_ids), [], "length"
    temperature = torch.tensor([asked.temperature or 1.0])
    for _ in range(asked.max_new_tokens):
        logits = cut(packed_logits(config, weights, [tokens], dtype)[-1:], asked)
        greedy = torch.tensor([asked.temperature == 0], dtype=torch.uint8)
        where = torch.tensor([asked.seed]), torch.tensor([len(tokens)])
        _, token, logit = gumbel_argmax(logits, temperature, *where, greedy)
        nodes = vocab_nodes(logits, temperature, config.leaves)
        logprobs.append(vocab_logprob(nodes, logit, temperature)[0].item())
        tokens.append(int(token))
        if tokens[-1] in asked.stop_ids:
            reason = "stop"
            break
    return Completion(request.id, tuple(tokens[len(request.prompt_ids) :]), tuple(logprobs), reason, 7)


def cut(logits: torch.Tensor, asked: SamplingParams) -> torch.Tensor:
    """By the definition of the filters, in float64."""
    if not asked.temperature:
        return logits
    p = (logits[0].double() / asked.temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda v: (-float(logits[0, v]), v))[: asked.top_k or len(p)]
    mass, kept = sum(p[v] for v in order), []
    for v in order:
        if asked.top_p < 1 and sum(p[u] for u in kept) >= asked.top_p * mass:
            break
        kept.append(v)
    kept = [v for v in kept if p[v] >= asked.min_p * max(p)]
    return torch.full_like(logits, -torch.inf).index_copy_(1, torch.tensor(kept), logits[:, kept])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tiny", torch.float32),
        ("tied", torch.float32),
        ("wide heads, odd widths", torch.float32),
        ("eight", torch.bfloat16),
    ],
)
def test_the_engine_is_the_model_run_naively(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    asked = requests(config)
    assert bits(engine(config, dtype=dtype).generate(asked)) == bits([naive(config, r, dtype) for r in asked])


def test_the_requests_cover_what_they_should(reference: list[Completion]) -> None:
    assert {c.finish_reason for c in reference} == {"stop", "length"}
    assert reference[0].token_ids != reference[1].token_ids, "two seeds drew the same"
    assert len({token for c in reference for token in c.token_ids}) > 10
    assert max(len(r.prompt_ids) + len(c.token_ids) for r, c in zip(requests(TINY), reference, strict=True)) > 64


@pytest.mark.parametrize("name", LIMITS)
def test_no_limit_changes_a_bit(name: str, reference: list[Completion]) -> None:
    served = engine(TINY, **LIMITS[name])
    assert bits(served.generate(requests(TINY))) == bits(reference)
    assert (served.scheduler.preemptions > 0) == ("few pages" in name)
    assert bits(served.generate(requests(TINY))) == bits(reference)  # over a cache that holds the first round
    assert (served.pool.hit_tokens > 0) == (name not in ("no prefix cache", "few pages, chunks, no cache", "one page"))


@pytest.mark.parametrize("name", ["chunks of 3", "few pages"])
def test_no_limit_changes_a_bit_in_bfloat16(name: str) -> None:
    expected = bits(alone(TINY, requests(TINY), dtype=torch.bfloat16))
    served = engine(TINY, dtype=torch.bfloat16, **LIMITS[name])
    for _ in range(2):
        assert bits(served.generate(requests(TINY))) == expected


@pytest.mark.parametrize("order", list(permutations([0, 3, 5, 7]))[::4], ids=str)
def test_order_changes_no_bit(order: tuple[int, ...], reference: list[Completion]) -> None:
    asked = requests(TINY)
    done = engine(TINY, chunk=5, batch=24).generate([asked[i] for i in order])
    assert bits(done) == bits([reference[i] for i in order])


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
def test_arriving_while_others_decode_changes_no_bit(overlap: bool, reference: list[Completion]) -> None:
    served, done = engine(TINY, page_size=4, pages=40, chunk=6, overlap=overlap), []
    late = requests(TINY)
    while late or not served.scheduler.idle:
        for _ in range(2):
            if late:
                served.add(late.pop())
        done += served.step()
    assert bits(sorted(done, key=lambda c: c.request_id)) == bits(reference)


def test_the_id_of_a_request_is_a_label(reference: list[Completion]) -> None:
    renamed = [replace(r, id=100 - r.id) for r in requests(TINY)]
    done = engine(TINY).generate(renamed)
    assert [c.request_id for c in done] == [r.id for r in renamed]
    assert bits([replace(c, request_id=100 - c.request_id) for c in done]) == bits(reference)


def test_seeds_repeat_and_differ() -> None:
    prompt = (1, 2, 3)
    seeds = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63 - 1]
    asked = [Request(i, prompt, SamplingParams(24, seed=s)) for i, s in enumerate(seeds + seeds)]
    done = engine(TINY).generate(asked)
    texts = [c.token_ids for c in done]
    assert texts[: len(seeds)] == texts[len(seeds) :]
    assert len(set(texts)) == len(seeds), "two seeds drew the same text"


def test_greedy_takes_the_largest_logit_and_ignores_the_seed() -> None:
    prompt = requests(TINY)[0].prompt_ids
    cold = engine(TINY).generate([Request(i, prompt, SamplingParams(8, 0.0, seed=i)) for i in range(2)])
    assert bits(cold)[0][1:] == bits(cold)[1][1:]
    weights, tokens = {p.name: w for p, w in random_weights(TINY)}, list(prompt)
    for token, recorded in zip(cold[0].token_ids, cold[0].logprobs, strict=True):
        logits = packed_logits(TINY, weights, [tokens])[-1]
        assert token == int(logits.argmax())
        expected = float(logits.double().log_softmax(0)[token])  # of temperature 1
        assert abs(recorded - expected) < 1e-5
        tokens.append(token)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_log_prob_is_that_of_the_tempered_distribution(temperature: float) -> None:
    prompt, asked = (5, 6), SamplingParams(20, temperature, seed=3)
    (done,) = engine(TINY).generate([Request(0, prompt, asked)])
    weights = {p.name: w for p, w in random_weights(TINY)}
    logits = packed_logits(TINY, weights, [[*prompt, *done.token_ids]]).double()
    at = torch.arange(len(done.token_ids)) + len(prompt) - 1
    expected = (logits[at] / temperature).log_softmax(1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert (torch.tensor(done.logprobs).double() - expected).abs().max() < 1e-5


def test_draws_follow_the_distribution() -> None:
    """4,000 first tokens of one prompt: chi-squared against softmax(logits / 1.3), 63 degrees of freedom."""
    prompt, count, temperature = (9, 4), 4000, 1.3
    asked = [Request(i, prompt, SamplingParams(1, temperature, seed=i)) for i in range(count)]
    done = engine(TINY, running=512, batch=1024, pages=600).generate(asked)
    weights = {p.name: w for p, w in random_weights(TINY)}
    p = (packed_logits(TINY, weights, [list(prompt)])[-1].double() / temperature).softmax(0)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in done]), minlength=64).double()
    common = p * count > 5
    rest = 1 - p[common].sum()
    chi = ((counts - p * count) ** 2 / (p * count))[common].sum()
    if rest * count > 5:
        chi += (counts[~common].sum() - rest * count) ** 2 / (rest * count)
    assert chi < common.sum() + 5 * (2 * common.sum()) ** 0.5, float(chi)
    assert (counts > 0).sum() > 5


def test_a_stop_token_is_kept_and_ends_the_text(reference: list[Completion]) -> None:
    for request, done in zip(requests(TINY), reference, strict=True):
        stops = request.sampling.stop_ids
        stopped = bool(stops) and done.token_ids[-1] in stops
        assert not set(done.token_ids[:-1]) & set(stops)
        assert done.finish_reason == ("stop" if stopped else "length")
        assert len(done.logprobs) == len(done.token_ids)
        assert stopped or len(done.token_ids) == request.sampling.max_new_tokens


def test_a_stop_id_in_the_prompt_stops_nothing() -> None:
    asked = SamplingParams(5, seed=1, stop_ids=(3,))
    (done,) = engine(TINY).generate([Request(0, (3, 3, 3), asked)])
    (free,) = engine(TINY).generate([Request(0, (3, 3, 3), replace(asked, stop_ids=()))])
    assert 3 not in free.token_ids and done == free


def test_stop_on_the_last_token_allowed_is_a_stop() -> None:
    (free,) = engine(TINY).generate([Request(0, (8,), SamplingParams(6, seed=11))])
    last = free.token_ids[-1]
    assert last not in free.token_ids[:-1]
    (done,) = engine(TINY).generate([Request(0, (8,), SamplingParams(6, seed=11, stop_ids=(last,)))])
    assert done.finish_reason == "stop" and done.token_ids == free.token_ids


def test_new_weights_forget_cached_keys_and_tag_the_version() -> None:
    asked = requests(TINY)
    served = engine(TINY, seed=0)
    served.generate(asked)
    cached = served.pool.match(asked[0].prompt_ids)
    assert cached, "there must be something to forget"
    served.pool.release(cached)
    served.load(random_weights(TINY, 1), 8)
    fresh = alone(TINY, asked, seed=1)
    new = served.generate(asked)
    assert {c.version for c in new} == {8}
    assert bits(new) == bits([replace(c, version=8) for c in fresh])


def test_keys_of_old_weights_would_change_bits() -> None:
    """The test above can fail: without the clearing, the second text is wrong."""
    asked = requests(TINY)
    served = engine(TINY, seed=0)
    served.generate(asked)
    served.pool.clear = lambda: None
    served.load(random_weights(TINY, 1), 7)
    stale, fresh = served.generate(asked), alone(TINY, asked, seed=1)
    assert sum(a != b for a, b in zip(bits(stale), bits(fresh), strict=True)) >= 5


@pytest.mark.parametrize("config", [TINY, EIGHT, SHAPES["tied"]], ids=["tiny", "eight", "tied"])
def test_load_returns_the_digest_of_what_was_sent(config: ModelConfig) -> None:
    sent: dict = {}
    for p, whole in random_weights(config, 3):
        sent |= slice_digests(config, p, whole, WHOLE)
    served = engine(config)
    before = served.runner.digests()
    held = served.load(random_weights(config, 3), 8)
    assert held == sent and digest(held) == digest(sent) != digest(before)


def test_ties_go_to_the_lowest_id() -> None:
    served = engine(TINY)
    served.load(flat_head(TINY), 8)
    asked = [Request(i, (1, 2), SamplingParams(40, float(i), seed=4)) for i in range(2)]
    cold, warm = served.generate(asked)
    assert set(cold.token_ids) == {0}
    assert len(set(warm.token_ids)) > 10
    assert len(set(logprob_bits(cold) + logprob_bits(warm))) == 1
    assert cold.logprobs[0] == pytest.approx(-torch.tensor(64.0).log().item(), abs=1e-6)
