"""An engine over 1, 2 and 4 real gloo ranks: the same tokens and log-prob bits, on every rank, as without any group."""

from typing import Any

import pytest

from kernels.weights.digest import digest
from tests.collectives.processes import run_ranks
from tests.rollout.ranks import MODELS, WORLD, outcome, work
from tests.rollout.scenarios import alone, bits, requests


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(WORLD, work)


@pytest.fixture(scope="module", params=MODELS)
def single(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.param, outcome(*MODELS[request.param], None)


def test_one_rank_serves_what_each_request_gets_alone(single: tuple[str, dict]) -> None:
    name, expected = single
    config, dtype = MODELS[name]
    assert expected["roomy"] == bits(alone(config, requests(config), dtype=dtype))
    assert expected["next weights"] != expected["roomy"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_says_the_same(ranks: list, single: tuple[str, dict], size: int) -> None:
    name, expected = single
    for rank in range(WORLD):
        actual = ranks[rank][size, name]
        assert actual.keys() == expected.keys() and "no number" in actual
        for scenario in expected:
            if "digests" not in scenario:
                assert actual[scenario] == expected[scenario], f"tp={size}, rank {rank}, {scenario}"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_together_hold_the_model(ranks: list, single: tuple[str, dict], size: int) -> None:
    name, expected = single
    for scenario in ("first digests", "next digests"):
        for first in range(0, WORLD, size):
            merged: dict = {}
            for rank in range(first, first + size):
                merged |= ranks[rank][size, name][scenario]
            assert merged == expected[scenario] and digest(merged) == digest(expected[scenario])
            assert size == 1 or len(ranks[first][size, name][scenario]) < len(merged)
