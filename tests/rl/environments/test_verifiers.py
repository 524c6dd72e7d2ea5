"""Environments of the package `verifiers`: exact in every turn, and what goes wrong in one costs its sample."""

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.compose import check
from rl.data import Problem, open_source
from rl.environments.choice import open_environment, open_hosts
from rl.environments.verifiers.play import Verifiers
from rl.errors import UserError
from rl.evaluation.command import main as evaluate
from rl.requests import requests_for, train_sampling
from rl.samples import completions
from rollout.replies import Replies
from rollout.sampling import Completion, Request
from tests.rl.command import call, command
from tests.rl.environments.folders import chat_folder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("verifiers") is None, reason="pip install 'samebit[verifiers]' is not done"
)
INSTALLED = Path(__file__).with_name("installed")
Say = Callable[[int, Request], str]  # (turn, what is asked) -> what the policy writes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("model"))


def asked(folder: Path, factory: str, *more: str) -> list[str]:
    return [
        "data=numbered",
        "data.problems=30",
        f"model.path={folder}",
        "environment.name=verifiers",
        f"environment.factory={factory}",
        "environment.max_tokens=300",
        "rollout.max_new_tokens=12",
        "warmup.steps=0",
        "logger=none",
        *more,
    ]


def opened(folder: Path, factory: str, *more: str) -> tuple[Verifiers, list[Problem], Any]:
    (config,) = check(asked(folder, factory, *more))
    hosts = open_hosts(config, {})
    source = open_source(config, None, hosts.about if hosts else None)
    environment, reward, name = open_environment(config, source, hosts, lambda line: None)
    assert reward is None and name == f"{factory}.get_reward" and isinstance(environment, Verifiers)
    return environment, source.train, train_sampling(config.rollout, source.tokenizer.ends)


class Policy:
    """Stands for the engines: writes what `say` says."""

    def __init__(self, of: Verifiers, say: Say) -> None:
        self.of, self.say, self.turns, self.asked = of, say, dict[int, int](), list[Request]()

    def __call__(self, requests: Sequence[Request], replies: Replies | None = None) -> list[Completion]:
        assert replies and not requests
        while new := replies.requests(idle=True):
            self.asked += new
            replies.take([self.completion(request) for request in new])
        return []

    def completion(self, request: Request) -> Completion:
        turn = self.turns[request.id] = self.turns.get(request.id, -1) + 1
        ids = self.of.tokenizer.completion(self.say(turn, request))[: request.sampling.max_new_tokens]
        logprobs = tuple(-float(np.float32(1 / (3 + i % 7))) for i in ids)
        reason = "stop" if ids[-1] in self.of.tokenizer.ends else "length"
        return Completion(request.id, ids, logprobs, reason, 5, request.sampling)  # type: ignore[arg-type]


def play(
    of: Verifiers, problems: Sequence[Problem], sampling: Any, say: Say, each: int = 1
) -> tuple[list[Any], Policy]:
    policy = Policy(of, say)
    return of.play(requests_for(problems, each, sampling, 3, "train", 1), policy, problems), policy


@pytest.fixture(scope="module")
def talk(folder: Path) -> Iterator[tuple[Verifiers, list[Problem], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(INSTALLED))
        yield opened(folder, "echo_talk")


def test_turns_are_the_tokens_that_were_written(talk: Any) -> None:
    """What the policy writes is never tokenised again, not even what another tokenisation of its text would be."""
    of, train, sampling = talk
    transcripts, policy = play(of, train[:2], sampling, lambda turn, request: f"t{turn} x", each=2)
    samples = of.judge([p for p in train[:2] for _ in range(2)], transcripts)
    for i, (transcript, sample) in enumerate(zip(transcripts, samples, strict=True)):
        said = completions(transcript)
        assert [of.tokenizer.decode(c.token_ids) for c in said] == ["t0 x", "t1 x", "t2 x"]
        assert sample.error == "" and sample.reward is not None and sample.counts["turns"] == 3
        assert sample.counts["words"] == 3
        text = "".join(of.tokenizer.decode(getattr(p, "token_ids", p), special=True) for p in transcript)
        end = of.tokenizer.decode([of.tokenizer.ends[0]], special=True)
        number = train[i // 2].record["number"]
        assert text.startswith(
            f"user:\ntask {number}{end}\nassistant:\nt0 x{end}\nuser:\nyou said 't0 x'{end}\nassistant:\nt1 x"
        )
    mine = [r for r in policy.asked if r.id == 0]
    assert len({r.sampling.seed for r in mine}) == 1 and len({r.sampling.seed for r in policy.asked}) == 4
    assert all(r.sampling.temperature == sampling.temperature and r.sampling.n == 1 for r in policy.asked)


def test_what_fails_costs_its_sample(talk: Any) -> None:
    of, train, sampling = talk
    problems = [p for p in train if p.record["number"] in (0, 27, 28, 29)]
    assert len(problems) == 4
    transcripts, _ = play(of, problems, sampling, lambda turn, request: "hm")
    expected = {27: "no board", 28: "anew", 29: "before it asked the policy"}
    for problem, sample in zip(problems, of.judge(problems, transcripts), strict=True):
        part = expected.get(problem.record["number"], "")
        assert part in sample.error and bool(sample.error) == bool(part), sample.error
        assert (sample.reward is None) == bool(part) and sample.counts["errors"] == bool(part)
        assert "\n" not in sample.error and completions(sample.transcript)
    with pytest.raises(UserError, match="the environment echo_talk"):
        play(replace(of, drop=None), problems, sampling, lambda turn, request: "hm")


def test_a_limit_ends_a_conversation_and_is_no_failure(talk: Any) -> None:
    of, train, sampling = talk
    of.line.inbox.longest, before = 20, of.line.inbox.longest
    try:
        (transcript,), _ = play(of, train[:1], sampling, lambda turn, request: "so")
    finally:
        of.line.inbox.longest = before
    (sample,) = of.judge(train[:1], [transcript])
    assert sample.error == "" and len(completions(transcript)) == 1 and sample.counts["cut"] == 1


def test_an_environment_that_takes_too_long_costs_its_sample(talk: Any) -> None:
    of, train, sampling = talk
    (transcript,), _ = play(replace(of, timeout=0.0), train[:1], sampling, lambda turn, request: "so")
    (sample,) = of.judge(train[:1], [transcript])
    assert "environment.timeout" in sample.error and sample.reward is None


def test_a_process_that_is_lost_costs_what_was_under_way(talk: Any) -> None:
    of, train, sampling = talk

    def ends(turn: int, request: Request) -> str:
        if turn == 1 and of.host._process:
            os.kill(of.host._process.pid, signal.SIGKILL)
        return "hm"

    transcripts, _ = play(of, train[:2], sampling, ends)
    assert all("ended its process" in s.error for s in of.judge(train[:2], transcripts))
    transcripts, _ = play(of, train[:2], sampling, lambda turn, request: "hm")
    assert not any(s.error for s in of.judge(train[:2], transcripts))


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("environment.factory=not_there",), "not_there"),
        (("environment.args={taskset:{colour:red}}",), "colour"),
        (("environment.args={taskset:{tasks:3}}",), "has 3 tasks"),
        (("data=arithmetic",), "set data=numbered"),
        (("model.path=null", "environment.max_tokens=100"), "chat template"),
        (("environment.factory=null",), "needs environment.factory=ID"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], part: str
) -> None:
    monkeypatch.syspath_prepend(str(INSTALLED))
    line = call(*asked(folder, "echo_talk", *more), "dry_run=true").error()
    assert part in line


@pytest.mark.skipif(
    importlib.util.find_spec("glossary") is None,
    reason="the published environment glossary is not installed: pip install --no-deps "
    "'glossary @ git+https://github.com/PrimeIntellect-ai/verifiers#subdirectory=environments/glossary'",
)
def test_a_published_environment_with_its_tool(folder: Path) -> None:
    """Its server of tools, its reward; the policy is one that reads what the tool said."""
    of, train, sampling = opened(
        folder,
        "glossary",
        "data.problems=5",
        "data.prompt='{number}'",
        "rollout.max_new_tokens=100",
        "environment.max_tokens=900",
    )

    def says(turn: int, request: Request) -> str:
        text = of.tokenizer.decode(request.prompt_ids)
        if turn == 0:
            entity = re.search(r'look up "(.*?)"', text)
            assert entity
            call = {"name": "facts_lookup", "arguments": {"name": entity[1]}}
            return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        told = re.search(r"<tool_response>\n(.*?)\n</tool_response>", text, re.DOTALL)
        assert told
        return f"<answer>{told[1]}</answer>"

    transcripts, policy = play(of, train[:2], sampling, says)
    for sample in of.judge(train[:2], transcripts):
        assert sample.error == "" and sample.reward == 1.0 and sample.counts["tool_calls"] == 1, sample
    assert "facts_lookup" in of.tokenizer.decode(policy.asked[0].prompt_ids)


@pytest.mark.slow
def test_a_run_is_exact_in_every_turn_and_one_hash(folder: Path, tmp_path: Path) -> None:
    """Real engines and trainer, two layouts of both; and the evaluation of what was trained plays the same episodes."""
    layouts = (
        ("rollout.tp=2", "rollout.replicas=1", "trainer.world_size=1"),
        (
            "rollout.tp=1",
            "rollout.replicas=2",
            "trainer.world_size=2",
            "rollout.page_size=3",
            "rollout.prefix_cache=false",
        ),
    )
    hashes = set()
    small = (
        "steps=2",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "eval.problems=3",
        "checkpoint.every=0",
    )
    tree = ("trainer.leaf_sequences=2", "trainer.micro_leaves=2")
    patch = {"PYTHONPATH": os.pathsep.join(filter(None, [str(INSTALLED), os.environ.get("PYTHONPATH", "")]))}
    for i, layout in enumerate(layouts):
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setenv("PYTHONPATH", patch["PYTHONPATH"])
            with command(
                *asked(folder, "echo_talk", *small, *tree, *layout), f"out_dir=run{i}", cwd=tmp_path
            ) as running:
                outcome = running.finish()
                assert outcome.code == 0, outcome
                running.assert_nothing_left()
        summary = json.loads((tmp_path / f"run{i}" / "summary.json").read_text())
        assert summary["tokens_nonzero"] == 0 < summary["tokens_compared"]
        hashes.add(summary["weights_sha256"])
        rows = [json.loads(line) for line in (tmp_path / f"run{i}" / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row.get("grpo/step")]
        assert all(row["environment/turns_mean"] > 1.5 and row["environment/errors"] < 8 for row in steps)
    assert len(hashes) == 1
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(INSTALLED))
    try:
        evaluate([str(tmp_path / "run0"), "--json", str(tmp_path / "found.json")])
    finally:
        monkeypatch.undo()
    assert json.loads((tmp_path / "found.json").read_text())["problems"] == 3
