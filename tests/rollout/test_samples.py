"""Samples, stop texts, prompt log-probs, streaming, abort, new weights in flight: what each changes, and what it does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.model import ModelConfig
from rollout.engine import Engine
from rollout.runner import _order
from rollout.sampling import Completion, Request, RequestError, SamplingParams, Token, sample_seed
from rollout.text import decode_all
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.rollout.scenarios import LIMITS, ROOMY, alone, bits, engine, flat_head, logprob_bits, most_bits, requests
from tests.trainer.batches import all_of_texts, plain_model, token_logprobs
from trainer.batch import Batch

PROMPT = tuple(range(3, 40))


@pytest.fixture(params=[False, True], ids=["", "overlapped"], autouse=True)
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOMY, "overlap", request.param)


def letters(ids) -> str:
    """A vocabulary of 64 characters."""
    return "".join(chr(40 + i) for i in ids)


def test_a_sample_is_a_request_with_its_own_seed() -> None:
    asked = SamplingParams(9, 0.9, seed=5, n=4)
    group = engine(TINY, page_size=4).generate([Request(7, PROMPT, asked)])
    assert [(c.request_id, c.sample) for c in group] == [(7, i) for i in range(4)]
    seeds = [sample_seed(5, i) for i in range(4)]
    assert seeds[0] == 5 and len(set(seeds)) == 4 and all(0 <= s < 2**63 for s in seeds)
    single = alone(TINY, [Request(7, PROMPT, replace(asked, n=1, seed=seed)) for seed in seeds])
    assert bits(group) == bits(single)
    assert len({c.token_ids for c in group}) == 4


def test_the_second_seed_is_fixed() -> None:
    assert sample_seed(42, 1) == 3437595557816637787


SCORED = [
    replace(r, sampling=replace(r.sampling, n=1 + r.id % 3), score_from=1 + 3 * r.id, top=r.id % 4)
    for r in requests(TINY)
]


@pytest.fixture(scope="module")
def scored() -> list[Completion]:
    """One sample after the other."""
    return [c for r in SCORED for c in engine(TINY, prefix_cache=False, running=1).generate([r])]


@pytest.mark.parametrize("name", LIMITS)
def test_no_limit_changes_a_bit_of_samples_and_scores(name: str, scored: list[Completion]) -> None:
    served = engine(TINY, **LIMITS[name])
    for _ in range(1 if name == "one token a step" else 2):
        done = served.generate(SCORED)
        assert bits(done) == bits(scored) and done == scored


@pytest.mark.parametrize("rows", [1, 5])
def test_a_long_prompt_is_scored_in_pieces(
    rows: int, scored: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.runner._SCORED_ROWS", rows)
    assert engine(TINY).generate(SCORED) == scored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "tied", "multi-query", "experts", "qwen2"])
def test_prompt_log_probs_are_the_trainers(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    asked = [replace(r, score_from=1) for r in requests(config)]
    served = engine(config, dtype=dtype, chunk=7, page_size=4, pages=200)
    model = plain_model(config, {p.name: w for p, w in random_weights(config)}, dtype)
    for _ in range(2):
        for request, done in zip(asked, served.generate(asked), strict=True):
            ids = request.prompt_ids + done.token_ids
            assert len(done.prompt_logprobs) == len(request.prompt_ids) - 1
            recorded = torch.tensor(done.prompt_logprobs + done.logprobs)
            batch = whole(ids, len(request.prompt_ids) - 1, request.sampling)
            trained = token_logprobs(model, batch).detach()
            assert_same_bits(trained, recorded, f"request {request.id}")
            if not request.sampling.truncated:  # all of it as a prompt, and nothing new
                nothing = replace(request.sampling, max_new_tokens=0)
                (scored,) = served.generate([Request(0, ids, nothing, 1)])
                assert_same_bits(trained, torch.tensor(scored.prompt_logprobs), f"request {request.id}, scored")


@pytest.mark.parametrize("name", LIMITS)
def test_a_text_that_is_only_scored_has_the_bits_of_decoding(name: str) -> None:
    """Greedy and hot texts: what was recorded while they were sampled, once more as a prompt with no new token."""
    drawn = [c for c in alone(TINY, requests(TINY)) if not requests(TINY)[c.request_id].sampling.truncated]
    asked = [
        Request(c.request_id, r.prompt_ids + c.token_ids, replace(r.sampling, max_new_tokens=0, n=2), len(r.prompt_ids))
        for c in drawn
        for r in [requests(TINY)[c.request_id]]
    ]
    served = engine(TINY, **LIMITS[name])
    for _ in range(2):
        for i, done in enumerate(served.generate(asked)):
            text = drawn[i // 2]
            assert (done.finish_reason, done.token_ids, done.matched) == ("length", (), None)
            assert_same_bits(
                torch.tensor(text.logprobs), torch.tensor(done.prompt_logprobs), f"request {text.request_id}"
            )
    assert served.pool.available == served.pool.pages


def test_a_prompt_that_is_only_computed_warms_the_cache() -> None:
    served = engine(TINY, page_size=4)
    (nothing,) = served.generate([Request(0, PROMPT, SamplingParams(0))])
    assert (nothing.token_ids, nothing.prompt_logprobs, nothing.finish_reason) == ((), (), "length")
    (done,) = served.generate([Request(0, PROMPT, SamplingParams(3))])
    assert done.cached_tokens == 36 and bits([done]) == bits(alone(TINY, [Request(0, PROMPT, SamplingParams(3))]))
    longest = tuple(i % TINY.vocab_size for i in range(TINY.max_positions))
    (done,) = engine(TINY, pages=400).generate([Request(0, longest, SamplingParams(0), 1)])
    assert len(done.prompt_logprobs) == len(longest) - 1, "a prompt of all positions there are"


def each_token(prompt: tuple[int, ...], scale: float) -> list[tuple[int, float]]:
    """(id, log-prob) of every token that may follow, each scored by itself; the most likely ones first."""
    asked = [Request(i, (*prompt, i), SamplingParams(0, scale), len(prompt)) for i in range(TINY.vocab_size)]
    scored = [(c.request_id, c.prompt_logprobs[0]) for c in engine(TINY, running=64, pages=400).generate(asked)]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.3}])
def test_the_most_likely_tokens(params: dict) -> None:
    """Of what is sampled those of the distribution drawn from, of a prompt those of the whole vocabulary."""
    asked = Request(0, PROMPT, SamplingParams(4, seed=11, **params), 30, top=5)
    (done,) = engine(TINY).generate([asked])
    assert len(done.top) == 4 and len(done.prompt_top) == len(PROMPT) - 30
    for place, top in enumerate(done.prompt_top, 30):
        expected = each_token(PROMPT[:place], asked.sampling.scale)[:5]
        assert most_bits(top) == most_bits(tuple(expected))
    for place, top in enumerate(done.top):
        ids = [i for i, _ in each_token(PROMPT + done.token_ids[:place], asked.sampling.scale)]
        assert [i for i, _ in top] == ids[: len(top)] and len(top) == (3 if asked.sampling.top_k else len(top))
        logprobs = dict(top)
        assert logprobs.get(done.token_ids[place], done.logprobs[place]) == done.logprobs[place]
        if asked.sampling.truncated:
            assert sum(np.exp(list(logprobs.values()))) == pytest.approx(1, abs=1e-5) or len(top) == 5
        if asked.sampling.greedy:
            assert top[0] == (done.token_ids[place], done.logprobs[place]), "the same float"


def test_among_equals_the_lower_ids_come_first() -> None:
    served = engine(TINY)
    served.load(flat_head(TINY), 8)
    (done,) = served.generate([Request(0, PROMPT, SamplingParams(2), 36, top=TINY.vocab_size)])
    for top in (*done.prompt_top, *done.top):
        assert [i for i, _ in top] == list(range(TINY.vocab_size)) and len({p for _, p in top}) == 1


def test_bits_order_as_numbers_do() -> None:
    values = torch.tensor([-torch.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, 3e38, torch.inf])
    order = _order(values, torch.arange(10))
    assert (order[1:] > order[:-1]).tolist() == [True] * 4 + [False] + [True] * 4, (
        "-0 and 0 are equal: the lower id first"
    )
    assert _order(values[:1], torch.tensor([2**31 - 1])) > torch.iinfo(torch.int64).min


def whole(ids: tuple[int, ...], given: int, asked: SamplingParams) -> Batch:
    """A sequence of which all but the first token count; the first `given` of these were not drawn."""
    return all_of_texts([(ids, given + 1, asked)])


def test_the_stream_is_the_completion() -> None:
    served, told = engine(TINY, **LIMITS["few pages"]), []
    served.on_token = told.append
    asked = [replace(r, sampling=replace(r.sampling, n=2)) for r in requests(TINY)]
    for done in served.generate(asked):
        mine = [t for t in told if (t.request_id, t.sample) == (done.request_id, done.sample)]
        expected = zip(done.token_ids, done.logprobs, strict=True)
        assert mine == [Token(done.request_id, done.sample, t, p, 7) for t, p in expected]
    assert served.scheduler.preemptions > 0


def stopping(config: ModelConfig, **limits) -> Engine:
    served = engine(config, **limits)
    served.scheduler.decode = letters
    return served


def test_a_stop_text_ends_the_sample_and_is_named() -> None:
    (free,) = alone(TINY, [Request(0, PROMPT, SamplingParams(20, seed=3))])
    text = letters(free.token_ids)
    early, late = text[4:7], text[9:12]
    cases = [(early,), (late, early), ("no such", late), (early + "?", text[5:8])]
    for stops in cases:
        for limits in ({}, LIMITS["few pages"], LIMITS["chunks of 3"]):
            served = stopping(TINY, **limits)
            others = [replace(r, id=r.id + 1) for r in requests(TINY)]
            (done, *rest) = served.generate([Request(0, PROMPT, SamplingParams(20, seed=3, stop=stops)), *others])
            ends = {text.find(s) + len(s): s for s in stops if s in text}
            end = min(ends)
            assert done.finish_reason == "stop" and done.matched == ends[end]
            assert done.token_ids == free.token_ids[:end] and done.logprobs == free.logprobs[:end]
            assert decode_all(letters, done.token_ids, stops) == text[: end - len(ends[end])]
            assert bits(rest) == bits([replace(c, request_id=c.request_id + 1) for c in alone(TINY, requests(TINY))])


def test_a_stop_that_never_comes() -> None:
    asked = SamplingParams(20, seed=3, stop=("~~~~",))
    (done,) = stopping(TINY).generate([Request(0, PROMPT, asked)])
    (free,) = alone(TINY, [Request(0, PROMPT, replace(asked, stop=()))])
    assert done == free and done.finish_reason == "length" and done.matched is None


def test_a_stop_id_is_named() -> None:
    for done, request in zip(engine(TINY).generate(requests(TINY)), requests(TINY), strict=True):
        assert done.matched == (done.token_ids[-1] if done.finish_reason == "stop" else None)
        assert done.matched is None or done.matched in request.sampling.stop_ids


def advance(served: Engine, asked: list[Request], steps: int) -> list[Completion]:
    for request in asked:
        served.add(request)
    return [c for _ in range(steps) for c in served.step()]


def finish(served: Engine) -> list[Completion]:
    done = []
    while not served.idle:
        done += served.step()
    return done


def test_abort_changes_no_other_request() -> None:
    expected = {c.request_id: c for c in alone(TINY, requests(TINY))}
    for victim in range(len(expected)):
        served = engine(TINY, **LIMITS["few pages"])
        done = advance(served, requests(TINY), 6)
        done += served.abort(victim)
        done += finish(served)
        assert sorted(c.request_id for c in done) == list(range(len(expected)))
        for c in done:
            if c.finish_reason == "abort":
                assert c.request_id == victim
                assert c.token_ids == expected[victim].token_ids[: len(c.token_ids)]
            else:
                assert bits([c]) == bits([expected[c.request_id]])
        assert served.pool.available == served.pool.pages


def test_abort_of_an_unknown_request_is_nothing() -> None:
    assert engine(TINY).abort(3) == []


def test_weights_in_flight_finish() -> None:
    served = engine(TINY, **LIMITS["chunks of 3"])
    done = advance(served, requests(TINY), 5)
    served.load(random_weights(TINY, 1), 8, in_flight="finish")
    assert served.scheduler.idle and not served.idle and served.version == 8
    done += finish(served)
    assert bits(sorted(done, key=lambda c: c.request_id)) == bits(alone(TINY, requests(TINY)))


def test_weights_in_flight_abort() -> None:
    served = engine(TINY, **LIMITS["chunks of 3"])
    done = advance(served, requests(TINY), 20)
    served.load(random_weights(TINY, 1), 8, in_flight="abort")
    done += finish(served)
    assert {c.finish_reason for c in done} >= {"abort"} and {c.version for c in done if c.token_ids} == {7}
    for c, free in zip(sorted(done, key=lambda c: c.request_id), alone(TINY, requests(TINY)), strict=True):
        assert c.token_ids == free.token_ids[: len(c.token_ids)]
        assert logprob_bits(c) == logprob_bits(free)[: len(c.token_ids)]
    assert bits(served.generate(requests(TINY)))[0][1:4] == bits(alone(TINY, requests(TINY), seed=1))[0][1:4]


@pytest.mark.parametrize("name", ["roomy", "chunks of 3", "few pages"])
def test_weights_in_flight_resume(name: str) -> None:
    """After the update a request goes on as a new one would, whose prompt is all the text so far; every token is tagged."""
    served = engine(TINY, **LIMITS[name])
    asked = [replace(r, score_from=1) for r in requests(TINY)]
    done = advance(served, asked, 9)
    served.load(random_weights(TINY, 1), 8, in_flight="resume")
    done += finish(served)
    spanning = 0
    for request, c in zip(asked, sorted(done, key=lambda c: c.request_id), strict=True):
        versions = c.versions or (c.version,) * len(c.token_ids)
        old = versions.count(7)
        assert versions == (7,) * old + (8,) * (len(versions) - old)
        spanning += 0 < old < len(versions)
        first = alone(TINY, [request], seed=0)[0]
        assert c.token_ids[:old] == first.token_ids[:old] and logprob_bits(c)[:old] == logprob_bits(first)[:old]
        assert c.prompt_logprobs == (first if old else alone(TINY, [request], seed=1)[0]).prompt_logprobs
        if old < len(versions):
            left = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - old)
            (rest,) = alone(TINY, [Request(0, request.prompt_ids + c.token_ids[:old], left)], seed=1)
            assert c.token_ids[old:] == rest.token_ids and logprob_bits(c)[old:] == logprob_bits(rest)
            assert (c.finish_reason, c.matched) == (rest.finish_reason, rest.matched)
    assert spanning >= 2


def test_more_tokens_than_there_are_cannot_be_likely() -> None:
    with pytest.raises(RequestError, match=r"request 3: top=-1 must be at least 0"):
        Request(3, (1,), SamplingParams(1), top=-1)
    with pytest.raises(
        RequestError, match=rf"top={TINY.vocab_size + 1} is more than the vocabulary of {TINY.vocab_size}"
    ):
        engine(TINY).check(Request(3, (1,), SamplingParams(1), top=TINY.vocab_size + 1))
