"""Speculation changes no bit, whatever drafters say: tokens, log-probs, what is told of them and how they end."""

import math
from dataclasses import replace
from itertools import count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import ModelConfig
from rollout.drafts.drafter import Draft
from rollout.drafts.history import History
from rollout.drafts.lookup import Lookup
from rollout.drafts.model import ModelDrafter
from rollout.drafts.pace import LONGEST_REST, Costs, Pace
from rollout.drafts.suffixes import GRAM, LATEST, REACH, Match, Suffixes
from rollout.engine import Engine, EngineConfig
from rollout.lockstep import Lockstep
from rollout.runner import RunnerError
from rollout.sampling import Completion, Request, SamplingParams, Token
from rollout.scheduler import Limits
from rollout.source import Source
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.rollout.liars import LIES, Liar, Rash, speculate
from tests.rollout.scenarios import LIMITS, alone, bits, engine, requests

NAMES = list(LIMITS)


@pytest.fixture(scope="module")
def reference() -> list[Completion]:
    return alone(TINY, requests(TINY))


def speculating(lie: str, truth: list[Completion], config: ModelConfig = TINY, reach: int = 5, **how: object) -> Engine:
    served = engine(config, speculate="auto", **how)
    speculate(served, Liar(lie, config.vocab_size, truth), reach)
    return served


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    limits=st.sampled_from(NAMES),
    lie=st.sampled_from(LIES),
    reach=st.integers(1, 14),
    order=st.permutations(range(10)),
    chance=st.sampled_from([0.2, 0.8]),
)
def test_no_lie_changes_a_bit(
    reference: list[Completion], limits: str, lie: str, reach: int, order: list[int], chance: float
) -> None:
    served = speculating(lie, reference, reach=reach, **LIMITS[limits])
    (liar,) = served.speculation.drafters
    liar.chance = chance
    told: list[Token] = []
    served.on_token = told.append
    asked = [requests(TINY)[i] for i in order]
    for _ in range(2):  # the second time over a cache
        told.clear()
        done = served.generate(asked)
        assert bits(done) == bits([reference[i] for i in order])
        for c in done:
            mine = [(t.id, t.logprob, t.version) for t in told if t.request_id == c.request_id]
            assert mine == list(zip(c.token_ids, c.logprobs, c.token_versions, strict=True))
        assert served.pool.available == served.pool.pages, "a page is not free at the end"
    assert {s.request.id for s in liar.heard} == set(range(10)) and len(liar.heard) == 20
    counts = served.drafts
    assert 0 <= counts.accepted <= counts.drafted and counts.tokens == counts.draws + counts.accepted
    if lie == "wrong":
        assert counts.accepted == 0
    if limits == "roomy":
        assert counts.drafted > 0 and (lie != "right" or counts.accepted > counts.drafted / 2)


@pytest.mark.parametrize("name", ["experts", "tied", "eight"])
def test_no_model_changes_a_bit(name: str) -> None:
    config, dtype = SHAPES[name], torch.bfloat16 if name == "eight" else torch.float32
    expected = alone(config, requests(config), dtype=dtype)
    served = speculating("half", expected, config, dtype=dtype, overlap=True, page_size=3, pages=200)
    assert bits(served.generate(requests(config))) == bits(expected)
    assert served.drafts.accepted > 10


def test_samples_scores_and_the_most_likely_tokens_are_the_same() -> None:
    asked = [
        replace(r, sampling=replace(r.sampling, n=2), score_from=1 + r.id, top=r.id % 3 * 2) for r in requests(TINY)
    ]
    expected = engine(TINY, page_size=4, pages=300).generate(asked)
    served = speculating("half", expected, page_size=4, pages=300)
    assert bits(served.generate(asked)) == bits(expected) and served.drafts.accepted > 10


def test_a_text_ends_inside_a_draft() -> None:
    """At a stop id, a stop text, or the limit: what was drafted beyond is dropped, and its pages are free."""
    free = engine(TINY).generate([Request(0, (8, 9), SamplingParams(20, seed=3))])[0].token_ids

    def letters(ids: list[int]) -> str:
        return "".join(chr(40 + i) for i in ids)

    for end in range(2, 12):
        stop = next(i for i, token in enumerate(free) if token == free[end])
        for how in ({"stop_ids": (free[end],)}, {"stop": (letters(free[end - 1 : end + 1]),)}, {"max_new_tokens": end}):
            request = Request(0, (8, 9), replace(SamplingParams(20, seed=3), **how))
            served = speculating("right", [], page_size=2, pages=60)
            served.scheduler.decode = letters
            served.speculation.drafters[0].said[0, 0] = (*free, *free)  # goes on after the end
            told: list[Token] = []
            served.on_token = told.append
            (done,) = served.generate([request])
            assert done.token_ids == free[: len(done.token_ids)] == tuple(t.id for t in told)
            assert done.matched == (how.get("stop_ids") or how.get("stop") or (None,))[0]
            assert len(done.token_ids) == (
                end if "max_new_tokens" in how else stop + 1 if "stop_ids" in how else end + 1
            )
            assert served.pool.available == 60 and (served.drafts.accepted > 0 or len(done.token_ids) < 6)


def test_pages_of_wrong_guesses_are_free_at_once() -> None:
    served = speculating("random", [], page_size=1, pages=64, reach=12)
    served.add(Request(0, (1, 2, 3), SamplingParams(40)))
    while not served.idle:
        served.step()
        for sequence in served.scheduler.running:
            assert len(sequence.pages) == sequence.computed == len(sequence.tokens) - 1
    assert served.drafts.drafted > 50 and served.pool.available == 64


def test_a_guess_that_gives_no_number_is_no_error(reference: list[Completion]) -> None:
    """A token whose embedding is no number is drafted, and never drawn."""
    drawn = {token for c in reference for token in c.token_ids} | {t for r in requests(TINY) for t in r.prompt_ids}
    (never, *_) = sorted(set(range(64)) - drawn)
    for lie in ("random", "stops"):
        served = speculating(lie, reference)
        served.speculation.drafters[0].one = lambda sequence, most: Draft([never] * most, "nan")
        served.runner.weights["embed"][never] = math.nan
        assert bits(served.generate(requests(TINY))) == bits(reference) and served.drafts.drafted > 0
    served.runner.weights["head"][:] = math.nan
    with pytest.raises(RunnerError, match="no logit is a number"):
        served.generate(requests(TINY))
    assert served.idle and served.pool.available == served.pool.pages


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", ["resume", "abort", "finish"])
def test_weights_are_replaced_in_flight(overlap: bool, policy: str) -> None:
    """Between the same tokens: what drafts is told to stop where the other engine is."""

    def run(lie: str | None) -> list[Completion]:
        served = engine(TINY, speculate="auto" if lie else "off", page_size=3, pages=90, overlap=overlap)
        if lie:
            speculate(served, Liar(lie, 64))
        served.add(Request(0, (5, 6), SamplingParams(24, seed=2)))
        heard: list[Token] = []
        served.on_token = heard.append
        done: list[Completion] = []
        for version in count(8):
            while not served.idle and len(heard) < (version - 7) * 6:
                done += served.step()
            if served.idle:
                return done
            served.load(random_weights(TINY, version % 2), version, policy)

    for lie in ("wrong", "no tokens of the model"):  # as many tokens a step as without drafts
        assert bits(run(lie)) == bits(run(None))
    (done,) = run("random")[:1]
    assert done.token_versions == tuple(sorted(done.token_versions))


def test_weights_replaced_in_flight_leave_no_key(reference: list[Completion]) -> None:
    """Drafts that are right bring tokens faster, so the weights change elsewhere; what follows is what the new ones say."""
    served = speculating("right", reference, overlap=True)
    request = requests(TINY)[5]
    served.add(request)
    while not served.scheduler.running or served.scheduler.running[0].sampled < 5:
        served.step()
    served.load(random_weights(TINY, 1), 8, "resume")
    old = served.scheduler.waiting[0].sampled
    assert old > 5, "nothing was accepted"
    done: list[Completion] = []
    while not done:
        done = served.step()
    (done_,) = done
    prompt, rest = request.prompt_ids + done_.token_ids[:old], request.sampling.max_new_tokens - old
    fresh = replace(request, prompt_ids=prompt, sampling=replace(request.sampling, max_new_tokens=rest))
    (expected,) = alone(TINY, [fresh], seed=1)
    assert done_.token_ids[old:] == expected.token_ids and done_.logprobs[old:] == expected.logprobs
    assert done_.token_versions == (7,) * old + (8,) * rest


def test_aborts_at_any_time_free_all_pages(reference: list[Completion]) -> None:
    for overlap in (False, True):
        served = speculating("half", reference, overlap=overlap, page_size=2, pages=300)
        done: list[Completion] = []
        for request in requests(TINY):
            served.add(request)
        for victim in (3, 1, 7):
            done += served.step() + served.step() + served.abort(victim)
        while not served.idle:
            done += served.step()
        kept = sorted((c for c in done if c.finish_reason != "abort"), key=lambda c: c.request_id)
        assert bits(kept) == bits([reference[c.request_id] for c in kept]) and len(done) == 10
        for c in done:
            assert c.token_ids == reference[c.request_id].token_ids[: len(c.token_ids)]
        assert served.pool.available == 300


def test_a_model_that_is_the_same_is_always_right(reference: list[Completion]) -> None:
    """It draws with the noise of the sequence; of a mixture of temperatures, filters and greedy sampling too."""
    small = engine(TINY, page_size=1, pages=2000)
    served = engine(TINY, speculate="auto")
    served.speculation.drafters, served.speculation.pace = [ModelDrafter(small)], Rash()
    assert bits(served.generate(requests(TINY))) == bits(reference)
    assert served.drafts.drafted - 4 <= served.drafts.accepted > 30, "wrong other than after a stop"
    assert served.drafts.accepted_of == {"model": served.drafts.accepted}
    assert small.pool.hit_tokens > 10 * 40, "the small model computed everything again"


def test_another_model_is_right_at_times_and_changes_nothing(reference: list[Completion]) -> None:
    served = engine(TINY, speculate="auto")
    small = engine(replace(TINY, max_positions=60), 5, page_size=1, pages=2000)
    served.speculation.drafters, served.speculation.pace = [ModelDrafter(small)], Rash()
    assert bits(served.generate(requests(TINY))) == bits(reference)
    assert 0 < served.drafts.drafted > served.drafts.accepted


def test_ranks_that_measure_for_themselves_stay_in_step() -> None:
    """By their own clocks they would not decide alike; a rank that drafts otherwise hangs or fails."""
    source = Source.open(None)
    limits = Limits(8, 256, 64)
    asked = [Request(i, tuple(b"one two one two" * (1 + i)), SamplingParams(60, i % 2 / 2, seed=i)) for i in range(5)]
    plain = Engine(source.config, EngineConfig(200, 4, True, limits))
    plain.load(source.weights(), 0)
    expected = plain.generate(asked)
    with Lockstep(source, EngineConfig(200, 4, True, limits, speculate="auto"), 2, 1) as ranks:
        for _ in range(2):
            assert bits(ranks.generate(asked)) == bits(expected)
        assert ranks.engine.drafts.drafted > 0


# What was said before ---------------------------------------------------------------------------------------------------


def by_hand(texts: list[tuple[list[int], int]], tokens: list[int]) -> list[int]:
    """The continuation that the definition of `Suffixes.find` names. `texts`: in the order in which they were indexed."""
    places = []
    for text, first in texts:
        for place in range(max(first, GRAM), len(text)):
            if text[place - GRAM : place] == tokens[-GRAM:]:
                common = 0
                while common < min(REACH, place, len(tokens)) and text[place - 1 - common] == tokens[-1 - common]:
                    common += 1
                places.append((common, text[place], text[place:]))
    places = places[-LATEST:]
    longest = [p for p in places if p[0] == max(q[0] for q in places)]
    votes = [sum(q[1] == p[1] for q in longest) for p in longest]
    return next((p[2] for p, v in zip(reversed(longest), reversed(votes), strict=True) if v == max(votes)), [])


TEXTS = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(texts=TEXTS, tail=st.lists(st.integers(0, 2), max_size=12), cuts=st.lists(st.integers(1, 7), max_size=3))
def test_suffixes_find_what_is_found_by_hand(texts: list, tail: list[int], cuts: list[int]) -> None:
    """Also where the last text grows by and by."""
    known = Suffixes()
    for text, first in texts[:-1]:
        known.add(text, first)
    whole, first = texts[-1]
    growing: list[int] = []
    number = known.add(growing, first)
    for cut in [*cuts, len(whole)]:
        growing += whole[len(growing) : len(growing) + cut]
        known.extend(number)
    for tokens in (tail, growing, [*texts[0][0][:9], *tail]):
        match = known.find(tokens) if len(tokens) >= GRAM else None
        expected = by_hand(texts, tokens) if len(tokens) >= GRAM else []
        assert (known.texts[match.text][match.place :] if match else []) == expected
    assert known.find([0, 1]) is None


def test_a_match_says_how_long_it_is() -> None:
    known = Suffixes()
    known.add([9, 1, 2, 3, 4, 5, 6])
    assert known.find([0, 1, 2, 3, 4]) == Match(0, 5, 4)
    assert known.find([7, 7, 3]) is None and known.find([4, 5, 6]) is None


@settings(max_examples=100, deadline=None)
@given(
    most=st.integers(1, 60),
    each=st.integers(1, 4),
    added=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=40),
)
def test_history_is_bounded_and_keeps_the_latest(most: int, each: int, added: list[tuple[int, int]]) -> None:
    history, truth = History(most, each), {}
    for i, (prompt, length) in enumerate(added):
        completion = [i] * length
        history.add((prompt,), completion)
        if 0 < length <= most:
            truth.setdefault(prompt, []).append(completion)
        kept = {p: [list(c) for c in history._kept[hash((p,))]] for p in truth if hash((p,)) in history._kept}
        assert history.tokens == sum(len(c) for texts in kept.values() for c in texts) <= most
        for p, texts in kept.items():
            assert len(texts) <= each and texts == truth[p][-len(texts) :], "not the latest"
        if 0 < length <= most:
            assert kept[prompt][-1] == completion, "the newest is gone"
    for prompt in range(5):
        history.of((prompt,))
    assert history.asked == 5 and history.found == len(history._kept)


def test_drafts_come_from_the_text_its_siblings_and_earlier_steps() -> None:
    config = replace(TINY, max_positions=512)
    served = engine(config, speculate="auto", pages=400)
    lookup = served.speculation.drafters[0]
    assert isinstance(lookup, Lookup)
    served.speculation.pace = Rash(reach=8)
    prompt = tuple(range(20, 30))
    greedy = Request(0, prompt, SamplingParams(150, 0.0))  # falls into a loop
    plain = engine(config, pages=400)
    assert bits(served.generate([greedy])) == bits(plain.generate([greedy]))
    assert served.drafts.accepted_of.get("own", 0) > 20
    before = served.drafts.accepted
    assert bits(served.generate([greedy])) == bits(plain.generate([greedy]))
    assert served.drafts.accepted_of.get("earlier", 0) > 2, "the start of the loop was said before"
    assert served.drafts.accepted > before and lookup.history.found == 1 and lookup.history.asked == 2
    served.load(random_weights(config, 0), 8)
    other = replace(greedy, prompt_ids=(4, 5, 6, 7, 8), sampling=SamplingParams(40, 0.0))
    for ahead in (0, 12):
        served.add(replace(other, id=ahead, prompt_ids=(9, 8, 7, 6), sampling=SamplingParams(60, 0.0)))
        for _ in range(ahead or 8):
            served.step()
    while not served.idle:
        served.step()
    assert served.drafts.accepted_of.get("sibling", 0) > 2
    served.generate([Request(1, (1,), SamplingParams(3))])
    lookup._forget_ended()
    assert not lookup._groups and not lookup._joined, "texts of what has ended are held"


def test_of_two_that_repeat_a_text_the_later_copies_the_first() -> None:
    lookup = Lookup()
    served = engine(TINY)
    served.add(Request(0, (1, 2, 3), SamplingParams(30, n=2)))
    first, second = served.scheduler.waiting
    first.tokens += [4, 5, 6, 7, 8, 9]
    second.tokens += [4, 5]
    drafts = lookup.draft([first, second], 3)
    assert drafts[0] is None and drafts[1] is not None
    assert list(drafts[1].tokens) == [6, 7, 8] and (drafts[1].source, drafts[1].grade) == ("sibling", 5)
    second.tokens += [4, 5, 4, 5, 4, 5]
    repeated = lookup.draft([second], 7)[0]
    assert repeated is not None and list(repeated.tokens) == [4, 5] * 3 + [4] and repeated.source == "own"


# How much is drafted ----------------------------------------------------------------------------------------------------


def paced(chance: float, seconds: object, running: int = 1, steps: int = 400) -> list[int]:
    """Drafted tokens of each step; a step of so many rows takes `seconds(rows)`."""
    pace, out = Pace(64), []
    for _ in range(steps):
        drafted = 0
        if pace.wants(running):
            drafted = sum(pace.lengths(running, [(chance, pace.reach)] * running, 64 - running))
        rows = running + drafted
        pace.record(drafted > 0, running, rows, seconds(rows))
        out.append(drafted)
    return out


def test_a_pace_drafts_as_much_as_pays() -> None:
    flat = paced(0.8, lambda rows: 1.0)
    assert sum(drafted >= 7 for drafted in flat) > 380, "rows are free"
    assert paced(0.0, lambda rows: 1.0 + rows / 50)[10:] == [0] * 390, "never right, so never checked"
    dear = paced(0.5, lambda rows: float(rows))
    assert sum(dear) <= 30 and sum(dear[100:]) == 0, "a row costs what a token brings"
    some = paced(0.5, lambda rows: 1.0 + rows / 20)
    assert 1 <= sorted(some)[200] <= 4
    assert sum(paced(0.9, lambda rows: 1.0, running=40)) == 0, "the batch fills the card"


def test_a_pace_that_does_not_pay_rests_longer_and_longer() -> None:
    pace, asked = Pace(64), []
    for step in range(300):
        if pace.wants(1):
            asked.append(step)
            pace.lengths(1, [(0.0, 4)], 60)
        pace.record(False, 1, 1, 1.0)
    gaps = [b - a for a, b in pairwise(asked)]
    assert gaps == sorted(gaps) and max(gaps) == LONGEST_REST + 1 and len(asked) < 16


def test_costs_of_ranks_are_those_of_the_first() -> None:
    ranks = [Costs(lambda numbers: [0.5] * len(numbers)) for _ in range(2)]
    for i in range(12):
        for rank, costs in enumerate(ranks):
            costs.record(i % 3 > 0, 1 + i, 1.0 + rank + i)
    for rows in range(1, 40):
        assert ranks[0].drafted(rows) == ranks[1].drafted(rows) and ranks[0].plain(rows) == ranks[1].plain(rows)


def test_costs_between_sizes_lie_on_a_line_and_none_is_far_off() -> None:
    costs = Costs()
    assert costs.drafted(1) is None and costs.plain(1) is None
    costs.record(False, 8, 1.0)
    costs.record(True, 24, 3.0)
    assert [costs.drafted(rows) for rows in (3, 8, 16, 24, 48, 50)] == [1.0, 1.0, 2.0, 3.0, 3.0, None]
    assert costs.plain(5) == 1.0 and costs.plain(24) is None
