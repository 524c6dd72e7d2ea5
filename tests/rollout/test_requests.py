"""A request that cannot be served is one line that names the field and the number, and leaves the engine as it was."""

import math

import pytest

from kernels.model import ConfigError
from rollout.engine import Engine, EngineConfig
from rollout.runner import RunnerError
from rollout.sampling import Request, RequestError, SamplingParams
from rollout.scheduler import Limits
from tests.model.shapes import TINY, random_weights
from tests.rollout.scenarios import bits, engine, requests


def line_of(attempt) -> str:
    with pytest.raises(RequestError) as error:
        attempt()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"max_new_tokens": 1, "temperature": math.nan}, "temperature=nan must be 0 (greedy) or a finite number"),
        ({"max_new_tokens": 1, "temperature": math.inf}, "temperature=inf"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature=-0.5"),
        ({"max_new_tokens": 1, "temperature": 1e-50}, "temperature=1e-50"),
        ({"max_new_tokens": 1, "seed": -1}, "seed=-1 must be in 0 .. 2^63 - 1"),
        ({"max_new_tokens": 1, "seed": 2**63}, f"seed={2**63}"),
    ],
    ids=str,
)
def test_sampling_parameters(fields: dict, message: str) -> None:
    assert message in line_of(lambda: SamplingParams(**fields))


REFUSED = [
    (Request(4, (), SamplingParams(1)), "request 4: the prompt is empty"),
    (Request(4, (1, 64), SamplingParams(1)), "request 4: a prompt id is outside the vocabulary of 64"),
    (Request(4, (1, -1), SamplingParams(1)), "request 4: a prompt id is outside the vocabulary of 64"),
    (Request(4, (1,) * 90, SamplingParams(7)), "90 prompt + 7 new tokens exceed the model's 96 positions"),
    (Request(4, (1,) * 30, SamplingParams(3)), "33 tokens do not fit the 32 of the key-value pages"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_a_refused_request_leaves_no_trace(request_: Request, message: str) -> None:
    served = engine(TINY, pages=4, page_size=8)
    good = Request(1, (1, 2, 3), SamplingParams(4))
    expected = bits(served.generate([good]))
    assert message in line_of(lambda: served.add(request_))
    assert message in line_of(lambda: served.generate([good, request_, Request(5, (1,), SamplingParams(2))]))
    assert served.scheduler.idle, "the good requests of a refused list are still in flight"
    assert served.pool.available == 4
    assert bits(served.generate([good])) == expected
    served.load(random_weights(TINY, 1), 8)


def test_the_edges_are_served() -> None:
    served = engine(TINY, pages=12, page_size=8)
    done = served.generate(
        [
            Request(0, (0,) * 95, SamplingParams(1)),
            Request(1, (63,), SamplingParams(95)),
            Request(2, (1,), SamplingParams(1, temperature=0.0, seed=2**63 - 1)),
        ]
    )
    assert [len(c.token_ids) for c in done] == [1, 95, 1]


def test_an_id_names_one_request() -> None:
    served = engine(TINY)
    asked = requests(TINY)[:2]
    assert "request 0: two requests have this id" in line_of(lambda: served.generate([asked[0], asked[0]]))
    served.add(asked[0])
    assert "request 0: a request with this id is already in flight" in line_of(lambda: served.add(asked[0]))
    done = []
    while not served.scheduler.idle:
        done += served.step()
    assert [c.request_id for c in done] == [0]
    assert bits(served.generate(asked[:1])) == bits(done)  # and is free again


def test_weights_wait_for_the_requests_in_flight() -> None:
    served = engine(TINY)
    served.add(requests(TINY)[0])
    served.step()
    before = served.runner.digests()
    message = line_of(lambda: served.load(random_weights(TINY, 1), 8))
    assert message == "weights of version 8 arrived while requests are in flight"
    assert served.version == 7 and served.runner.digests() == before


def test_an_engine_without_weights_draws_nothing() -> None:
    empty = Engine(TINY, EngineConfig(8, 8, True, Limits(4, 64, 64)))
    with pytest.raises(RequestError, match="the engine has no weights: load them first"):
        empty.generate([Request(3, (1, 2), SamplingParams(2))])
    assert empty.idle


def test_a_forgotten_tensor_is_noticed() -> None:
    served = Engine(TINY, EngineConfig(8, 8, True, Limits(4, 64, 64)))
    served.load(((p, w) for p, w in random_weights(TINY) if p.name != "layers.1.down"), 0)
    with pytest.raises(RunnerError, match="request 3: no logit is a number"):
        served.generate([Request(3, (1, 2), SamplingParams(2))])


def test_one_of_a_batch_without_a_number_is_named() -> None:
    """A token whose embedding is no number, in the prompt of one request of three."""
    served = engine(TINY)
    served.runner.weights["embed"][63] = math.nan
    asked = [Request(i, (1, 62 + (i == 4), 2), SamplingParams(4)) for i in (3, 4, 5)]
    with pytest.raises(RunnerError, match="request 4: no logit is a number"):
        served.generate(asked)
    assert served.idle and len(served.generate([asked[0], asked[2]])) == 2


def test_keys_that_were_no_numbers_are_not_found_again() -> None:
    served = engine(TINY, page_size=4)
    asked = requests(TINY)[:2]
    expected = bits(served.generate(asked))
    served.runner.cache.keys.fill_(math.nan)  # a fault that passes
    with pytest.raises(RunnerError, match="no logit is a number"):
        served.generate(asked)
    assert served.idle and bits(served.generate(asked)) == expected


def test_shards_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.tp=4"):
        TINY.check_shards(4)
