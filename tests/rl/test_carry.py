"""Samples that are carried over to the next step: which go on, under which weights, and what proves each token."""

import contextlib
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from rl.align import AlignmentError
from rl.carry import FILE, Carrying, Pool
from rl.clock import Clock
from rl.compose import check
from rl.errors import UserError
from rl.lag import Lagging, carried, drawn_ahead
from rl.pack import pack
from rl.prepare import prepare
from rl.prove import SMALL, Layout, against, prove
from rl.report import read_lines
from rl.resume import Start
from rl.samples import Sample
from rollout.engine import Engine
from rollout.sampling import Completion, Request, SamplingParams
from tests.rl.in_process import Run, plain
from tests.rl.test_lag import Slow, begin
from tests.rollout.liars import Liar, speculate
from trainer.batch import Batch

MOST = 12  # tokens of a sample
GROUPS, SIZE = 3, 2


class Texts(Slow):
    """Draws tokens that name their sample and place, of lengths that are known, and writes down what is asked of whom."""

    def __init__(self, lengths: dict[int, int] | None = None, seed: int = 0, rewards: Any = None) -> None:
        super().__init__(seed)
        self.lengths, self.asked = lengths or {}, list[list[tuple[int, int, int, int]]]()
        self.compared = dict[tuple[int, int], int]()  # (sample, place): times
        self.reward = rewards or (lambda sample: 1.0)

    def requests_for(self, problems: Any, step: int, first: int) -> list[Request]:
        """The seed of a sample is its number in the run."""
        begun = self.cursor - len(problems)
        samples = [(p, (begun + i) * SIZE + j) for i, p in enumerate(problems) for j in range(SIZE)]
        return [Request(i, p.prompt_ids, SamplingParams(MOST, seed=s)) for i, (p, s) in enumerate(samples)]

    def generate(self, requests: Any) -> list[Completion]:  # type: ignore[override]
        time.sleep(self.pauses.random() / 100)
        assert [r.id for r in requests] == list(range(len(requests)))
        self.asked.append(
            [(r.sampling.seed, len(r.prompt_ids) - 2, r.sampling.max_new_tokens, self.version) for r in requests]
        )
        return [self._went_on(r) for r in requests]

    def _went_on(self, request: Request) -> Completion:
        sample, had = request.sampling.seed, len(request.prompt_ids) - 2
        assert request.prompt_ids == (1, 2, *(1000 * sample + i for i in range(had))), "it goes on after other tokens"
        ends = self.lengths.get(sample, MOST)
        new = range(had, min(ends, had + request.sampling.max_new_tokens))
        assert new, "a sample that is done was asked again"
        stopped = new[-1] + 1 == ends < MOST
        ids, said = tuple(1000 * sample + i for i in new), tuple(_logprob(sample, i, self.version) for i in new)
        return Completion(request.id, ids, said, "stop" if stopped else "length", self.version, request.sampling)

    def judge(self, problems: Any, transcripts: Any) -> list[Sample]:
        return [Sample(t, "", self.reward(t[1].sampling.seed)) for t in transcripts]

    def batch(self, groups: Any, reference: object = None) -> Batch:
        return pack([sample.transcript for group in groups for sample in group.samples])

    def _said(self, batch: Batch) -> np.ndarray:
        """What the trainer says of each token: by its place in the sequence, and by the weights that are asked."""
        ids, places = batch.token_ids[batch.rows], batch.positions - 2
        for token, place in zip(ids.tolist(), places.tolist(), strict=True):
            assert token % 1000 == place
            self.compared[token // 1000, place] = self.compared.get((token // 1000, place), 0) + 1
        versions = batch.versions.tolist()
        said = np.array(
            [_logprob(t // 1000, t % 1000, v) for t, v in zip(ids.tolist(), versions, strict=True)], np.float32
        )
        said.view(np.uint32)[0] ^= self.flip
        return said


def _logprob(sample: int, place: int, version: int) -> float:
    return float(np.float32(-(1 + sample + place / 16 + version / 1024)))


def carrying(
    fake: Texts, tokens: int, lag: int = 0, at_once: bool = False, every: int = 1, rounds: int = 1,
    start: Start | None = None, last: int | None = None,
) -> Lagging:  # fmt: skip
    parts = fake.steps(rounds=rounds)
    ready, pool = (drawn_ahead(start), carried(start)) if start else (None, None)
    return Lagging(parts, lag, every, last, at_once, ready, Carrying(parts, tokens, pool))


def trained(fake: Texts, step: Lagging, first: int, last: int) -> list[tuple[dict[str, Any], Batch]]:
    if first == 1:
        step.publish(0)
    return [step(number, show=True) for number in range(first, last + 1)]


def test_who_goes_on_under_which_weights() -> None:
    """Of three problems a step, two samples each: the second's last sample is long, so its whole group waits."""
    fake = Texts({0: 3, 1: 4, 2: 2, 3: 10, 4: 1, 5: 4} | dict.fromkeys(range(6, 60), 2))
    (first, one), (second, two) = trained(fake, carrying(fake, 4), 1, 2)
    # Two groups are done after a round of 4 tokens, so a second one is drawn, with three further problems
    assert [len(asked) for asked in fake.asked] == [6, 7, 7]
    assert fake.asked[1][0] == (3, 4, 4, 0) and fake.asked[2][0] == (3, 8, 4, 1)
    assert one.token_ids[one.rows].tolist() == [
        i * 1000 + j for i, n in ((0, 3), (1, 4), (4, 1), (5, 4), (6, 2), (7, 2)) for j in range(n)
    ]
    # The second step has two groups that wait; the long one ends in its round, and is the oldest
    mine = two.token_ids[two.rows] // 1000
    assert mine.tolist() == [2] * 2 + [3] * 10 + [8, 8, 9, 9, 10, 10, 11, 11]
    assert two.versions[mine == 3].tolist() == [0] * 8 + [1] * 2
    assert (first["sampling/rounds"], first["sampling/carried"], first["sampling/groups_waiting"]) == (2, 1, 2)
    assert (second["sampling/rounds"], second["sampling/carried"], second["sampling/groups_waiting"]) == (1, 0, 3)
    assert (first["policy/version_lag"], second["policy/version_lag"]) == (0, 1)
    assert second["policy/version_lag_mean"] == (10 + 8) / 20
    assert first["sampling/tokens_drawn"] == 3 + 4 + 2 + 8 + 1 + 4 + 12 and second["sampling/tokens_drawn"] == 2 + 12
    assert first["divergence/tokens_compared"] == len(one.rows) and second["divergence/tokens_compared"] == 20
    assert (first["policy/updates_on_policy"], second["policy/updates_on_policy"]) == (1, 0)


def test_a_step_that_has_its_groups_draws_nothing() -> None:
    fake = Texts(dict.fromkeys(range(6), 6) | dict.fromkeys(range(6, 60), 2))
    (_, _), (second, batch) = trained(fake, carrying(fake, 4), 1, 2)
    assert len(fake.asked) == 2 and second["sampling/rounds"] == 0 and "time/sample" not in second
    assert (batch.token_ids[batch.rows] // 1000).tolist() == [n for n in range(6, 12) for _ in range(2)]
    assert second["divergence/tokens_compared"] == 12


cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, MOST), min_size=1, max_size=40),
        "tokens": st.integers(1, MOST),
        "lag": st.integers(0, 3),
        "rounds": st.integers(1, 3),
        "silent": st.sets(st.integers(0, 12)),
        "cut": st.integers(1, 4),
    }
)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_every_token_is_drawn_once_and_compared_once(case: dict[str, Any], tmp_path_factory: Any) -> None:
    """At once or in turn, and where the run was stopped, the same batches; each token by the weights of its step, whatever the
    lengths."""
    lengths = {i: n for i, n in enumerate(case["lengths"] * 100)}
    tokens, lag, rounds = case["tokens"], case["lag"], case["rounds"]

    def fake(seed: int) -> Texts:
        return Texts(lengths, seed, lambda sample: float(sample % SIZE and sample // SIZE % 13 not in case["silent"]))

    whole, other = fake(1), fake(2)
    told = trained(whole, carrying(whole, tokens, lag, False, 1, rounds), 1, 5)
    step = carrying(other, tokens, lag, True, 1, rounds)
    again = trained(other, step, 1, case["cut"])
    folder = tmp_path_factory.mktemp("checkpoint")
    rest = fake(3)
    rest.cursor, rest.weights, rest.version = other.cursor, other.weights, other.version
    there = begin(folder, step.ahead(), case["cut"])
    again += trained(rest, carrying(rest, tokens, lag, not case["cut"] % 2, 1, rounds, there), case["cut"] + 1, 5)
    for (mine, batch), (theirs, copy) in zip(told, again, strict=True):
        assert _bytes(batch) == _bytes(copy) and plain(mine) == plain(theirs)
        assert batch.sequences == GROUPS * SIZE and mine["divergence/tokens_compared"] == len(batch.rows)
        assert mine["divergence/tokens_nonzero"] == 0
    samples = [int(s) for _, batch in told for s in dict.fromkeys((batch.token_ids[batch.rows] // 1000).tolist())]
    assert len(set(samples)) == len(samples), "a sample was trained on twice"
    assert set(whole.compared.values()) == {1}, "a token was compared twice"
    for number, (_, batch) in enumerate(told, 1):
        assert batch.versions.max(initial=0) <= max(0, number - 1 - lag)
        assert (np.diff(batch.versions)[np.diff(batch.sequence) == 0] >= 0).all()


def _bytes(batch: Batch) -> bytes:
    return b"".join(getattr(batch, name).tobytes() for name in ("token_ids", "lengths", "rows", "logprobs", "versions"))


def test_budget_of_whole_samples_is_no_carry() -> None:
    fake, usual = Texts(), Texts()
    plain_steps = usual.steps()
    plain_steps.publish(0)
    for (metrics, batch), number in zip(trained(fake, carrying(fake, MOST), 1, 3), (1, 2, 3), strict=True):
        assert metrics["sampling/carried"] == metrics["sampling/groups_waiting"] == metrics["policy/version_lag"] == 0
        assert _bytes(batch) == _bytes(plain_steps.packed(plain_steps.drawn(number, Clock()).groups, Clock(), False))
        usual.publish(number)


@pytest.mark.parametrize(("lag", "at_once", "step_"), [(0, False, 2), (1, False, 3), (1, True, 2)])
def test_a_bit_that_differs_in_a_carried_sample_stops_the_run(lag: int, at_once: bool, step_: int) -> None:
    """Before it is trained on, and before it is done."""
    fake = Texts(dict.fromkeys(range(99), 6))
    step = carrying(fake, 4, lag, at_once)
    trained(fake, step, 1, 1)
    fake.flip = 1
    with pytest.raises(AlignmentError, match=f"step {step_}: sample 0, position 6, token {6 * step_ - 6}004"):
        step(2, show=False)
    assert fake.weights == 1


def test_what_is_not_compared_is_not_counted() -> None:
    """Every second step is: of a sample that three steps drew, the tokens of the first and the last."""
    fake = Texts()
    told = trained(fake, carrying(fake, 4, every=2), 1, 4)
    _, batch = told[2]
    assert batch.versions.tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 6
    for sample in _samples(batch):
        assert [(sample, place) in fake.compared for place in range(MOST)] == [True] * 4 + [False] * 4 + [True] * 4
    drawn = [metrics["sampling/tokens_drawn"] for metrics, _ in told]
    assert sum(fake.compared.values()) == drawn[0] + drawn[2]
    for metrics, batch in told:
        counted = sum(divmod(token, 1000) in fake.compared for token in batch.token_ids[batch.rows].tolist())
        assert metrics.get("divergence/tokens_compared", 0) == counted < len(batch.rows) or counted in (
            0,
            len(batch.rows),
        )


def test_groups_that_teach_nothing_are_drawn_anew() -> None:
    """As often as there may be rounds once enough groups are done; what is left of them then is gone, and its proofs."""
    fake = Texts(dict.fromkeys(range(99), 2), rewards=lambda sample: float(sample % 2 and sample >= 8))
    step = carrying(fake, 4, rounds=2)
    (first, one), (second, two) = trained(fake, step, 1, 2)
    assert (first["sampling/rounds"], first["sampling/groups_dropped"]) == (2, 3)
    assert _samples(one) == [0, 1, 8, 9, 10, 11] and len(fake.asked) == 3
    assert step._carrying is not None and not step._carrying.pool.proven
    assert (second["sampling/rounds"], second["sampling/groups_dropped"]) == (1, 0)
    assert _samples(two) == [12, 13, 14, 15, 16, 17]


def _samples(batch: Batch) -> list[int]:
    return list(dict.fromkeys((batch.token_ids[batch.rows] // 1000).tolist()))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    fake = Texts({0: 3, 1: 4, 2: 2, 3: 10, 4: 1, 5: 4} | dict.fromkeys(range(6, 60), 2))
    step = carrying(fake, 4)
    trained(fake, step, 1, 1)
    there = begin(tmp_path, step.ahead(), 1)
    assert step._carrying is not None
    pool, found = step._carrying.pool, carried(there)
    assert found is not None and pool.under_way and pool.done and pool.proven
    assert (found.started, found.under_way, found.done) == (pool.started, pool.under_way, pool.done)
    assert {seed: {at: x.tobytes() for at, x in one.items()} for seed, one in found.proven.items()} == {
        seed: {at: x.tobytes() for at, x in one.items()} for seed, one in pool.proven.items()
    }
    for evil in (Path, time.sleep, contextlib.ExitStack, Carrying):
        with pytest.raises(UserError, match=f"{FILE} cannot be read: it holds a .*, which is no plain data"):
            carried(begin(tmp_path, {FILE: pickle.dumps(evil)}, 2))
    assert carried(Start(None, False, ())) is None


@pytest.mark.parametrize("lag", [0, 1])
def test_one_digest(lag: int, mesh: DeviceMesh) -> None:
    """With a real engine and a real trainer: in turn, at once, in other micro-batches, with drafts, and where it stopped."""
    keys = (f"algorithm.lag={lag}", "algorithm.mini_batches=2", "trainer.lr=1e-2")

    def run(
        micro_leaves: int, at_once: bool, first: int, last: int, left: Run | None, pool: Pool | None, ready: Any
    ) -> Any:
        one = Run(mesh, keys, micro_leaves, left)
        if left:
            one.engine = Engine(one.model, replace(one.engine.config, speculate="auto"))
            speculate(one.engine, Liar("random", one.model.vocab_size))
            one.step = replace(one.step, rollout=one.engine)
        step = Lagging(one.step, lag, 1, None, at_once, ready, Carrying(one.step, 3, pool))
        step.publish(first - 1)
        return one, step, [plain(step(n, show=False)[0]) for n in range(first, last + 1)]

    whole, _, told = run(1, False, 1, 5, None, None, None)
    assert all(m["divergence/tokens_nonzero"] == 0 and m["divergence/tokens_compared"] > 0 for m in told)
    assert told[-1]["policy/version_lag"] > lag and told[-1]["sampling/carried"] > 0
    cut, step, before = run(4, True, 1, 3, None, None, None)
    step.ahead()
    assert step._carrying is not None
    pool = pickle.loads(pickle.dumps(step._carrying.pool))
    rest, _, after = run(2, True, 4, 5, cut, pool, step._ready)
    assert before + after == told and rest.digest() == whole.digest()
    assert rest.engine.drafts.drafted > 0


def test_a_run_that_carries_nothing_has_the_usual_digest(mesh: DeviceMesh) -> None:
    usual, other = (Run(mesh, ("trainer.lr=1e-2",), 2) for _ in range(2))
    usual.steps(1, 3)
    step = Lagging(other.step, 0, 1, None, True, None, Carrying(other.step, 5))
    step.publish(0)
    for number in (1, 2, 3):
        step(number, show=False)
    assert other.digest() == usual.digest()


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_is_one_hash_over_layouts_and_killed(lag: int, tmp_path: Path) -> None:
    """Whole runs, and their logs: something was carried, and all of it was compared."""
    keys = ("rollout.carry=2", f"algorithm.lag={lag}", "steps=4", "checkpoint.keep=9")
    chosen = [
        Layout("float32", 1, 4, "none", "none", 1, 1, "split", False),
        Layout("float32", 2, 2, "none", "optimizer", 2, 2, "colocated", True),
        Layout("float32", 4, 1, "layer", "none", 1, 2, "split", True),
    ]
    rows = list(prove(chosen, keys, tmp_path, 512))
    assert not against(rows) and len({row.compared for row in rows}) == 1
    told = list[list[Any]]()
    for i in range(len(chosen)):
        steps = [row for row in read_lines(tmp_path / str(i) / "metrics.jsonl") if "policy/version_lag" in row]
        assert all(row["sampling/carried"] > 0 and row["divergence/tokens_compared"] > 0 for row in steps)
        assert steps[-1]["policy/version_lag"] > lag and steps[-1]["policy/version_lag_mean"] > lag
        told.append([[x for name, x in row.items() if name.startswith("sampling/")] for row in steps])
        sides = [{side for side, *_ in row["time/spans"]} for row in steps]
        assert (
            all({"sampler", "trainer", "both"} <= one for one in sides) and steps[-1]["time/step_over_longer_half"] > 0
        )
        assert "Both sides at work" in (tmp_path / str(i) / "report.html").read_text()
    assert told[0] == told[1] == told[2], "another layout carried other samples"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("mode=rollout_only",), "with rollout.carry=2: a batch is drawn by older weights"),
        (("align.keep_batches=[1]",), "with rollout.carry=2: a batch is drawn by older weights"),
        (("environment.name=tools", "environment.factory=x:Y"), "no checkpoint holds; set rollout.carry=0"),
        (("rollout.carry=-1",), "rollout.carry=-1: input should be greater than or equal to 0"),
    ],
)
def test_what_carry_cannot_be_with(keys: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        (config,) = check([*SMALL, "rollout.carry=2", f"out_dir={tmp_path / 'run'}", *keys])
        prepare(config)
