"""The engine's keys have one type and one range, whoever takes them: a run's config, the server, the engine."""

from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.compose import check
from rl.config import RolloutSection
from rollout.arguments import ArgumentError
from rollout.engine import EngineConfig
from rollout.keys import ranges
from rollout.sampling import RequestError
from rollout.scheduler import Limits
from rollout.serve import ServeConfig

RUN = check(["out_dir=unused"])[0].rollout.model_dump()
LIMITS = Limits(4, 16, 8)
NUMBERS = ("pages", "page_size", *asdict(LIMITS))


def refused(name: str, value: int) -> tuple[bool, bool]:
    """By a run's config, and by the engine."""
    run = engine = False
    try:
        RolloutSection.model_validate(RUN | {name: value})
    except ValidationError:
        run = True
    try:
        if name in asdict(LIMITS):
            Limits(**asdict(LIMITS) | {name: value})
        else:
            EngineConfig(**{"pages": 4, "page_size": 4, "prefix_cache": True, "limits": LIMITS} | {name: value})
    except RequestError:
        engine = True
    return run, engine


@given(st.sampled_from(NUMBERS), st.sampled_from([-1, 0, 1, 2**60 - 1, 2**60, 2**63]) | st.integers())
def test_what_the_engine_refuses_a_run_and_the_server_refuse(name: str, value: int) -> None:
    expected = not 1 <= value < 2**60
    assert refused(name, value) == (expected, expected)
    if value == 0 and name != "page_size":
        assert getattr(ServeConfig(device="cpu", **{name: value}), name) == 0  # decided at the start
    elif expected:
        with pytest.raises(ArgumentError, match=f"{name}={value} must be at "):
            ServeConfig(device="cpu", **{name: value})
    else:
        ServeConfig(device="cpu", **{name: value})


def test_the_meanings_are_the_same() -> None:
    server, run = ranges(ServeConfig), RolloutSection.model_fields
    for kind in (EngineConfig, Limits):
        for field in fields(kind):
            if field.name in run:
                meaning = ranges(kind)[field.name].meaning
                assert meaning and server[field.name].meaning.startswith(meaning)
                assert [note.description for note in run[field.name].metadata] == [meaning]
