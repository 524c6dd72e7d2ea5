"""Conversations of several turns: the sampler's bits are the trainer's in every one of them, whoever is first and however the
engine serves them."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.algorithms import open_algorithm
from rl.algorithms.grpo import GrpoSection
from rl.compose import check
from rl.config import RunConfig
from rl.data import Problem, Source
from rl.data.numbered import LETTERS
from rl.data.tokenizer import of_characters
from rl.environments.choice import open_environment, open_hosts
from rl.environments.conversation import Played
from rl.environments.environment import Environment, Generate, score
from rl.environments.formats.call import Call
from rl.environments.hosts import Hosts
from rl.environments.tools import Tools
from rl.environments.turns import PlainTurns
from rl.errors import UserError
from rl.journal import conversations
from rl.pack import pack_demonstrations
from rl.requests import requests_for
from rl.samples import completions
from rollout.engine import Engine
from rollout.replies import STEPS, Replies
from rollout.sampling import Completion, Request, SamplingParams
from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights
from tests.rl.algorithms.groups import PLAIN
from tests.rollout.scenarios import LIMITS, engine
from tests.trainer.batches import plain_model, token_logprobs

TOKENIZER = of_characters([LETTERS])
TINY = replace(SHAPES["tiny"], vocab_size=len(TOKENIZER))
STOPS = tuple(range(0, len(TOKENIZER), 3))  # random weights end an answer soon
SAMPLING = SamplingParams(6, 0.8, stop_ids=STOPS, top_p=0.95)
GAMES = "tests.rl.environments.games"


def always(text: str, tools: Any) -> list[Call]:
    """What random weights write is a note, and now and then a call that cannot be."""
    return [Call("note", {"text": text}) if len(text) % 3 else Call("note", error="what?")]


def served(by: Engine, steps: int = STEPS) -> Generate:
    """The engine as a conversation asks it."""

    def generate(requests: Sequence[Request], replies: Replies | None = None, /) -> list[Completion]:
        if not replies:
            return by.generate(requests)
        news = [*requests, *replies.requests(idle=True)]
        while news or not by.idle:
            replies.take(by.advance(news, steps))
            news = replies.requests(idle=by.idle)
        return []

    return generate


def tools(hosts: Hosts, drop: bool = False, **more: Any) -> Tools:
    said: list[str] = []
    return Tools(
        tokenizer=TOKENIZER,
        name=hosts.about.name,
        hosts=hosts,
        turns=PlainTurns(TOKENIZER),
        read=more.pop("read", always),
        reward=None,
        max_turns=more.pop("max_turns", 4),
        max_tokens=more.pop("max_tokens", 48),
        drop=said.append if drop else None,
    )


def problems(count: int = 5, **row: Any) -> list[Problem]:
    prompts = [f"problem {i} of the kind {'abc'[i % 3]}" for i in range(count)]
    return [Problem(p, p, TOKENIZER.encode(p), "", "", {"name": f"n{i}", **row}) for i, p in enumerate(prompts)]


def play(of: Tools, by: Engine, asked: Sequence[Problem], each: int = 2, steps: int = STEPS) -> list[Any]:
    return of.play(requests_for(asked, each, SAMPLING, 3, "train", 1), served(by, steps), asked)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    out = Hosts(f"{GAMES}:Notes", {}, workers=2, timeout=60)
    yield out
    out.close()


@pytest.fixture(scope="module")
def expected(hosts: Hosts) -> list[Any]:
    """Each conversation alone, in an engine of its own without a cache."""
    asked = problems()
    requests = requests_for(asked, 2, SAMPLING, 3, "train", 1)
    out = []
    for i, request in enumerate(requests):
        fresh = served(engine(TINY, prefix_cache=False), steps=1)
        out += tools(hosts).play([request], fresh, [asked[i // 2]])
    return out


def assert_same(played: Sequence[Any], expected: Sequence[Any]) -> None:
    """The same tokens, log-probs by their bits, and outcomes."""
    for one, other in zip(played, expected, strict=True):
        assert tuple(one) == tuple(other) and one.outcome == other.outcome
        for a, b in zip(completions(one), completions(other), strict=True):
            assert_same_bits(torch.tensor(a.logprobs), torch.tensor(b.logprobs), "log-probs")


@pytest.mark.parametrize("limits", [*LIMITS])
def test_how_it_is_served_changes_nothing(hosts: Hosts, expected: list[Any], limits: str) -> None:
    by = engine(TINY, **({"pages": 80} | LIMITS[limits] | ({"pages": 30} if "few pages" in limits else {})))
    for steps in (1, 5):
        assert_same(play(tools(hosts), by, problems(), steps=steps), expected)
    assert by.idle


def test_who_is_first_changes_nothing(hosts: Hosts, expected: list[Any]) -> None:
    """Tools that take their time, each its own; their processes, one or three, or none."""
    slow = problems()
    slow = [replace(p, record={**p.record, "pause": 0.15 * ((7 * i) % 3)}) for i, p in enumerate(slow)]
    from tests.rl.environments.games import Notes

    for other in (Hosts(f"{GAMES}:Notes", {}, 1, 60), Hosts(f"{GAMES}:Notes", {}, 3, 60), Hosts("", {}, 1, 60, Notes)):
        assert_same(play(tools(other), engine(TINY), slow), expected)
        other.close()


def test_a_slow_tool_holds_nobody(hosts: Hosts, expected: list[Any], tmp_path: Path) -> None:
    """The tool of two conversations answers once all others have ended."""
    asked, gate = problems(), tmp_path / "gate"
    asked[1] = replace(asked[1], record={**asked[1].record, "until": str(gate)})
    others = sum(len(completions(t)) for i, t in enumerate(expected) if i not in (2, 3))
    inner = served(engine(TINY))

    def generate(requests: Sequence[Request], replies: Replies | None = None, /) -> list[Completion]:
        assert replies
        take, seen = replies.take, list[int]()

        def counted(done: Sequence[Completion]) -> None:
            seen.extend(c.request_id for c in done if c.request_id not in (2, 3))
            take(done)
            if len(seen) == others:
                gate.touch()

        replies.take = counted  # type: ignore[method-assign]
        return inner(requests, replies)

    played = tools(hosts).play(requests_for(asked, 2, SAMPLING, 3, "train", 1), generate, asked)
    assert gate.exists()
    assert_same(played, expected)


def test_turns_are_those_of_a_conversation(expected: list[Any]) -> None:
    """Prompt, completion, answer, completion ...; the answers are what the environment said, and what ended it is counted."""
    assert {len(completions(t)) for t in expected} > {4}, "some end early: a limit, or no room"
    for played in expected:
        kinds = [isinstance(piece, Completion) for piece in played]
        assert kinds == [bool(i % 2) for i in range(len(kinds))]
        texts = [TOKENIZER.decode(p) for p in played if not isinstance(p, Completion)]
        told = [m["content"] for m in played.outcome.messages if m["role"] == "tool"]
        assert texts[0].endswith(":") and texts[1:] == [f"\n{text}\n" for text in told][: len(texts) - 1]
        counts = played.outcome.counts
        assert counts["turns"] == len(completions(played)) and counts["tool_calls"] == len(told) and counts["cut"] == 1
        assert counts["malformed_calls"] == sum(json.dumps({"error": "what?"}) == text for text in told)
        assert all(c.version == 7 for c in completions(played))


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_the_trainer_computes_every_turn(hosts: Hosts, name: str) -> None:
    config, asked = replace(SHAPES[name], vocab_size=len(TOKENIZER)), problems()
    of = tools(hosts)
    played = play(of, engine(config, page_size=4, pages=200), asked)
    section = {"name": "grpo", "prompts_per_step": 5, "group_size": 2, "advantage": "grpo", "loss_mean": "token"}
    grpo = open_algorithm(GrpoSection.model_validate(section | PLAIN | {"clip_low": 0.2, "clip_high": 0.28}), 6)
    groups = score(asked, played, of)
    batch = grpo.batch(groups)
    model = plain_model(config, {p.name: w for p, w in random_weights(config)})
    assert_same_bits(token_logprobs(model, batch, leaf_sequences=2).detach(), torch.from_numpy(batch.logprobs), "all")
    assert len(batch.rows) == sum(len(c.token_ids) for t in played for c in completions(t)) > 60
    assert all(s.reward == len("".join(m["content"] for m in _made(s.transcript))) for g in groups for s in g.samples)


def _made(played: Any) -> list[Any]:
    """The texts that were noted: of the messages that the environment answered without an error."""
    told = played.outcome.messages
    return [a for a, b in itertools.pairwise(told) if b["role"] == "tool" and "error" not in b["content"]]


def test_later_turns_come_from_the_cache(hosts: Hosts) -> None:
    """All whole pages of what was said before; without a cache none."""
    for cache in (True, False):
        played = play(tools(hosts), engine(TINY, page_size=4, pages=400, prefix_cache=cache), problems(), each=1)
        for conversation in played:
            known = before = 0  # tokens that the last turn computed: all but what followed its last sampled token
            for piece in conversation:
                if isinstance(piece, Completion):
                    least = max(0, known - 1) // 4 * 4 if cache else 0
                    assert piece.cached_tokens >= least and (cache or not piece.cached_tokens)
                    known = before + len(piece.token_ids) - 1
                before += len(piece.token_ids if isinstance(piece, Completion) else piece)


def test_a_room_that_is_full_ends_a_conversation(hosts: Hosts) -> None:
    for most in (12, 20, 33):
        for played in play(tools(hosts, max_tokens=most), engine(TINY), problems()):
            length = sum(len(p.token_ids if isinstance(p, Completion) else p) for p in played)
            assert length <= len(problems()[0].prompt_ids) + most and played.outcome.counts["cut"] == 1
    with pytest.raises(UserError, match=r"environment.max_tokens=3: .*'problem 0 of the kind a'"):
        play(tools(hosts, max_tokens=3), engine(TINY), problems())


@pytest.mark.parametrize("does", ["exit", "quit", "reset", "nan"])
def test_one_that_fails_is_left_out_or_ends_the_run(expected: list[Any], does: str) -> None:
    """The others are what they were."""
    hosts = Hosts(f"{GAMES}:Bad", {}, 2, 60)
    asked = problems()
    asked[2] = replace(asked[2], record={**asked[2].record, "does": does})
    simple = tools(hosts, drop=True, read=lambda text, tools: [Call("note", {"text": text})])
    played = play(simple, engine(TINY), asked)
    assert [bool(t.outcome.error) for t in played] == [i in (4, 5) for i in range(10)]
    groups = score(asked, played, simple)
    assert [s.reward is None for g in groups for s in g.samples] == [i in (4, 5) for i in range(10)]
    assert "the environment Bad" in groups[2].samples[0].error and "'problem 2" in groups[2].samples[0].error
    assert all(len(completions(t)) for t in played), "a sequence has a token to train on, if with no weight"
    counted = conversations([s for g in groups for s in g.samples])
    assert counted["environment/errors"] == 2 and 0 < counted["speed/cached_prompt_frac"] < 1
    with pytest.raises(UserError, match="the environment Bad"):
        play(tools(hosts, read=simple.read), engine(TINY), asked)
    hosts.close()


def test_a_text_without_a_call_is_the_last_one(hosts: Hosts) -> None:
    played = play(tools(hosts, read=lambda text, tools: []), engine(TINY), problems())
    assert all(len(t) == 2 and t.outcome.counts["tool_calls"] == 0 for t in played)


def opened(*overrides: str) -> tuple[RunConfig, Source, Environment]:
    few = () if "data=dataset" in overrides else ("data.problems=200",)
    (config,) = check([*overrides, *few])
    hosts = open_hosts(config, {})
    assert hosts
    from rl.data import open_source

    source = open_source(config, None, hosts.about)
    return config, source, open_environment(config, source, hosts)[0]


@pytest.mark.parametrize("recipe", ["calculator", "guess"])
def test_a_teacher_shows_whole_conversations(recipe: str) -> None:
    """In the policy's place: each of its texts is a stretch of the batch, and the same every time."""
    config, source, environment = opened(f"+recipe={recipe}")
    assert isinstance(environment, Tools) and environment.teaches
    sampling = SamplingParams(config.rollout.max_new_tokens, stop_ids=source.tokenizer.ends)
    shown = environment.demonstrate(source.train[:24], sampling)
    assert shown == environment.demonstrate(source.train[:24], sampling)
    assert max(len(completions(t)) for t in shown) >= (2 if recipe == "calculator" else 8)
    batch = pack_demonstrations(shown)
    assert np.isclose(batch.weights.sum(), 1) and len(batch.rows) == sum(
        len(c.token_ids) for t in shown for c in completions(t)
    )
    texts = [source.tokenizer.decode(completions(t)[0].token_ids) for t in shown]
    assert sum("(" in text for text in texts) > 6
    longest = max(sum(len(p.token_ids if isinstance(p, Completion) else p) for p in t) for t in shown)
    assert longest <= max(len(p.prompt_ids) for p in source.train) + config.environment.max_tokens
    environment.hosts.close()


def test_a_rewards_function_sees_the_conversation() -> None:
    """TRL's arguments: the messages after the prompt, and the public attributes of the environment; beside its own reward."""
    asked = ("+recipe=guess", f"reward={GAMES.replace('games', 'test_tools')}:seen", "warmup.steps=0")
    _, source, environment = opened(*asked)
    assert isinstance(environment, Tools)
    shown = environment.demonstrate(source.train[:4], SamplingParams(8, stop_ids=source.tokenizer.ends))
    ended = [Played.of(t, replace(t.outcome, state={"guesses": 3, "found": True}, reward=1.0)) for t in shown]  # type: ignore[attr-defined]
    samples = environment.judge(source.train[:4], ended)
    assert [s.parts for s in samples] == [{"seen": float(len(t.outcome.messages)) + 3, "Guess": 1.0} for t in ended]
    assert [s.reward for s in samples] == [len(t.outcome.messages) + 4.0 for t in ended]
    environment.hosts.close()


def seen(completions: list[Any], environments: list[Any], number: list[int], **columns: Any) -> list[float]:
    """A reward in TRL's style."""
    assert {m["role"] for c in completions for m in c} <= {"assistant", "tool"}
    return [float(len(c)) + e.guesses for c, e in zip(completions, environments, strict=True)]


def test_tools_of_a_row_are_not_forgotten_in_silence(tmp_path: Path) -> None:
    rows = [{"question": f"{i}+1=", "answer": i + 1, "tools": [{"name": "add"}]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="has tools of its own"):
        opened(
            "environment.name=tools",
            f"environment.factory={GAMES}:Notes",
            "data=dataset",
            f"data.path={tmp_path}/rows.jsonl",
        )


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("environment.name=tools",), "needs environment.factory"),
        ((f"environment.factory={GAMES}:Notes",), "set environment.name=tools too"),
        (("environment.name=tools", "environment.factory=no.module:X"), "No module named"),
        (("+recipe=guess", "warmup.steps=0", "environment.format=hermes"), ""),
        (("+recipe=guess", "environment.args={lowest: 1}"), "unexpected keyword argument 'lowest'"),
    ],
)
def test_what_cannot_be_is_refused(overrides: tuple[str, ...], part: str) -> None:
    if not part:
        opened(*overrides)[2].hosts.close()  # type: ignore[attr-defined]
        return
    with pytest.raises(UserError) as error:
        opened(*overrides)
    assert part in str(error.value) and "\n" not in str(error.value)
