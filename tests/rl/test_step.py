"""A step and the loop over steps, with fakes for all that they work with."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl.align import AlignmentError
from rl.checkpoints import Progress
from rl.data import Problem
from rl.environments.environment import Generate
from rl.evaluation import Evaluation
from rl.journal import Journal, Totals
from rl.loop import Loop
from rl.pack import pack
from rl.samples import Group, Sample, Transcript
from rl.step import Step
from rollout.sampling import Completion, Request, SamplingParams
from trainer.batch import Batch, StepReport
from trainer.loss import PolicyLoss


class Fake:
    """Everything that a step works with; writes down what is asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.version, self.flip, self.drift = 0, 0, 0.0
        self.loss, self.cursor, self.worst = PolicyLoss(), 0, None
        self.firsts: list[tuple[int, int]] = []
        self.rewards: Iterator[float] = itertools.repeat(1.0)

    def take(self, count: int) -> list[Problem]:
        self.cursor += count
        return [Problem(f"{i}", "", (1, 2), "", "", None) for i in range(self.cursor - count, self.cursor)]

    def requests_for(self, problems: Sequence[Problem], step: int, first: int) -> list[Request]:
        asked = [p for p in problems for _ in range(2)]
        self.firsts.append((first, len(problems)))
        return [Request(i, p.prompt_ids, SamplingParams(2, seed=step)) for i, p in enumerate(asked)]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append("generate")
        return [Completion(r.id, (5, 6), (-0.5, -1.5), "length", self.version, r.sampling) for r in requests]

    def play(self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem]) -> list[Transcript]:
        assert len(requests) == 2 * len(problems)
        return [(r.prompt_ids, c) for r, c in zip(requests, generate(requests), strict=True)]

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        return [Sample(transcript, "56", next(self.rewards)) for transcript in transcripts]

    def batch(self, groups: Sequence[Group], reference: object = None) -> Batch:
        transcripts = [s.transcript for g in groups for s in g.samples]
        return pack(transcripts, *np.ones((2, 2 * len(transcripts)), np.float32))

    def step(self, batch: Batch, loss: object, lr: float) -> StepReport:
        self.calls.append(("train", loss, lr))
        logprobs = batch.logprobs.copy()
        logprobs.view(np.uint32)[3] ^= self.flip
        logprobs += np.float32(self.drift * (self.calls.count(self.calls[-1]) - 1))
        return StepReport(logprobs, np.arange(batch.sequences), batch.counts, 0.25, 1, 2.0, 1, 1 << 20, 1 << 20)

    def digest(self) -> str:
        return "digest"

    def to_rollout(self) -> None:
        self.calls.append("to rollout")

    def to_trainer(self, weights_stay: bool) -> None:
        self.calls.append(("to trainer", weights_stay))

    def publish(self, version: int) -> None:
        self.calls.append(("publish", version))
        self.version = version

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        yield

    def log(self) -> Any:
        return SimpleNamespace(
            worst=None,
            step=lambda number, metrics: self.rows.append((number, metrics)),
            alert=lambda title, text: self.calls.append(("alert", text)),
            completions=lambda number, rows: self.calls.append(("shown", number, len(list(rows)))),
        )

    def steps(self, policy: str = "fail", rounds: int = 1, mini_batches: int = 1, epochs: int = 1) -> Step:
        decode: Any = SimpleNamespace(decode=lambda ids, special: "t")
        journal = Journal(self.log(), decode, "exact", 10, Totals())
        return Step(
            stream=self, requests_for=self.requests_for, environment=self, algorithm=self, rollout=self, trainer=self,
            cards=self, journal=journal, publish=self.publish, phase=self.phase, prompts=3, rounds=rounds,
            mini_batches=mini_batches, epochs=epochs,
            lr=lambda step: 0.5 / step, policy=policy,  # type: ignore[arg-type]
        )  # fmt: skip


def test_a_step_samples_trains_and_publishes_in_this_order() -> None:
    fake = Fake()
    metrics, batch = fake.steps()(1, show=True)
    train = ("train", fake.loss, 0.5)
    order = [
        "to rollout",
        "generate",
        ("to trainer", False),
        train,
        ("shown", 11, 4),
        ("publish", 1),
    ]  # 3 firsts, the worst
    assert fake.calls == order and not fake.rows  # who calls it logs it
    assert batch.sequences == 6 and metrics["divergence/tokens_nonzero"] == 0 and metrics["reward/mean"] == 1
    assert metrics["policy/version_lag"] == 0 and "divergence/first_mismatch" not in metrics
    phases = {f"time/{name}" for name in ("handover", "sample", "score", "train", "publish", "step")}
    phases |= {"time/sampler_busy", "time/trainer_busy", "time/step_over_longer_half", "time/spans"}
    assert {name for name in metrics if name.startswith("time/")} == phases
    _, batch = fake.steps()(2, show=False)
    assert set(batch.versions.tolist()) == {1} and fake.calls[-2 - 1] == ("train", fake.loss, 0.25)


def test_groups_that_teach_nothing_are_sampled_anew() -> None:
    """The problems of a step go on where its first ones ended, and so does the stream's cursor."""
    fake, shown = Fake(), list[tuple[int, int]]()
    fake.rewards = itertools.chain([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0])
    fake.batch = lambda groups: shown.extend(g.problem.id for g in groups) or Fake.batch(fake, groups)  # type: ignore[method-assign,assign,func-returns-value]
    metrics, batch = fake.steps(rounds=4)(1, show=False)
    assert fake.firsts == [(0, 3), (3, 2), (5, 1)] and fake.cursor == 6
    assert shown == ["1", "4", "5"] and batch.sequences == 6
    assert (metrics["sampling/rounds"], metrics["sampling/groups_dropped"]) == (3, 3)
    assert fake.calls.count("generate") == 3 and fake.calls.count("to rollout") == 1


def test_only_the_first_update_on_a_batch_is_compared() -> None:
    """The others are told of: the weights of none of them are the sampler's."""
    fake = Fake()
    fake.drift = 0.5
    metrics, batch = fake.steps(mini_batches=3, epochs=2)(1, show=True)
    assert fake.calls.count(("train", fake.loss, 0.5)) == 6 and fake.calls[-1] == ("publish", 1)
    assert (metrics["policy/updates"], metrics["policy/updates_on_policy"]) == (6, 1)
    assert batch.sequences == 6 and metrics["divergence/tokens_compared"] == 4 and metrics["divergence/ratio_max"] == 1
    assert metrics["off_policy/ratio_min"] == pytest.approx(np.exp(0.5), rel=1e-6)
    assert metrics["off_policy/ratio_max"] == pytest.approx(np.exp(2.5), rel=1e-6)
    assert metrics["off_policy/clip_fraction"] == 5 / 20 and metrics["off_policy/grad_norm_max"] == 2
    assert not any(name.startswith("off_policy") for name in Fake().steps()(1, show=False)[0])


def test_nothing_is_trained_after_an_update_that_differs() -> None:
    fake = Fake()
    fake.flip = 1
    with pytest.raises(AlignmentError, match="1 of 4 response tokens differ"):
        fake.steps(mini_batches=3, epochs=2)(1, show=False)
    assert fake.calls.count(("train", fake.loss, 0.5)) == 1 and len(fake.rows) == 1


def test_weights_that_lag_are_told() -> None:
    fake = Fake()
    fake.version = 4
    assert fake.steps()(7, show=False)[0]["policy/version_lag"] == 2


def test_a_bit_that_differs_is_logged_and_nothing_is_published() -> None:
    fake = Fake()
    fake.flip = 1
    with pytest.raises(AlignmentError, match="step 1: sample 1, position 3, token 6"):
        fake.steps()(1, show=False)
    ((number, metrics),) = fake.rows
    assert number == 11 and metrics["divergence/tokens_nonzero"] == 1 and metrics["phase"] == "grpo"
    assert not any(call[0] == "publish" for call in fake.calls)


def test_a_batch_is_kept_before_it_is_trained_and_told_of_before_a_run_stops() -> None:
    fake, told = Fake(), list[Any]()
    fake.flip = 1
    keeper: Any = SimpleNamespace(
        sampled=lambda step, batch: told.append(("sampled", step, list(fake.calls))),
        trained=lambda step, batch, logprobs: told.append(("trained", step, len(logprobs) == len(batch.rows))),
    )
    with pytest.raises(AlignmentError):
        replace(fake.steps(), keeper=keeper)(4, False)
    (first, *before), second = told
    assert first == "sampled" and before[0] == 4 and not any(call[0] == "train" for call in before[1])
    assert before[1][-1] == ("to trainer", False) and second == ("trained", 4, True)


def test_a_contrast_run_records_where_it_differs_and_goes_on() -> None:
    fake = Fake()
    fake.flip = 1
    metrics, _ = fake.steps("record")(1, show=False)
    assert metrics["divergence/first_mismatch"]["position"] == 3 and fake.calls[-1] == ("publish", 1)


class Told(contextlib.nullcontext[None]):
    """A bar."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __call__(self, done: int, total: int, note: str) -> None:
        self.lines.append(f"{done}/{total} {note.split('  ')[1]}")


def loop(
    fake: Fake,
    bar: Told,
    found: Sequence[float],
    save_at: int,
    eval_every: int,
    saved: list[Progress],
    rounds: int = 1,
) -> Loop:
    accuracies, step = iter(found), fake.steps(rounds=rounds)
    checkpoints: Any = SimpleNamespace(
        settle=lambda: None,
        due=lambda step, last: step == save_at,
        save=lambda state, digest, files: saved.append(state),
    )
    return Loop(
        step=step,
        stream=fake,  # type: ignore[arg-type]
        evaluate=lambda step: Evaluation(next(accuracies), 0.0),
        speeds=lambda batch, seconds: {"speed/step_tokens_per_s": 1.0},
        trainer=fake,
        cards=fake,
        journal=step.journal,
        checkpoints=checkpoints,
        bar=bar,  # type: ignore[arg-type]
        steps=4,
        eval_every=eval_every,
    )


def test_the_loop_evaluates_and_saves_where_that_is_due() -> None:
    fake, bar, saved = Fake(), Told(), list[Progress]()
    assert loop(fake, bar, (0.25, 0.5, 0.75), 3, 2, saved).run(Progress()) == (0.25, 0.75)
    assert [number for number, _ in fake.rows] == [10, 11, 12, 13, 14, 15]
    evaluated = {number: row["eval/accuracy"] for number, row in fake.rows if "eval/accuracy" in row}
    assert evaluated == {10: 0.25, 12: 0.5, 15: 0.75}  # after the last step once
    assert bar.lines == ["1/4 accuracy 0.250", "2/4 accuracy 0.500", "3/4 accuracy 0.500", "4/4 accuracy 0.500"]
    (state,) = saved
    assert (state.step, state.cursor, state.tokens_compared, state.accuracy) == (3, 9, 36, (0.25,))
    assert fake.calls[0] == ("publish", 0)


def test_the_loop_goes_on_where_a_checkpoint_was() -> None:
    """The problems after its cursor, and no second evaluation before."""
    fake = Fake()
    run = loop(fake, Told(), (0.5,), 9, 0, []).run
    assert run(replace(Progress(), step=3, cursor=9, accuracy=(0.125,))) == (0.125, 0.5)
    assert [number for number, _ in fake.rows] == [14, 15] and fake.cursor == 12
    assert fake.calls[0] == ("publish", 3) and fake.calls[-1] == ("publish", 4)


def test_a_checkpoint_knows_what_further_rounds_took() -> None:
    """A run that goes on from it samples the problems, and the numbers of them, that it would have sampled."""

    def rewards() -> Iterator[float]:
        return itertools.cycle([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])

    whole, saved = Fake(), list[Progress]()
    whole.rewards = rewards()
    loop(whole, Told(), (0.25, 0.5), 2, 0, saved, rounds=3).run(Progress())
    (state,) = saved
    at = next(i for i in range(len(whole.firsts)) if sum(n for _, n in whole.firsts[:i]) == state.cursor)
    assert state.cursor > 2 * 3 and whole.firsts[at][0] == 0

    again = Fake()
    again.rewards = itertools.islice(rewards(), 2 * state.cursor, None)
    loop(again, Told(), (0.5,), 9, 0, [], rounds=3).run(state)
    assert again.firsts == whole.firsts[at:] and again.cursor == whole.cursor
