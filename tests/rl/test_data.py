"""Problems in their order, tokenizers, and the reasoning-gym source."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.compose import check
from rl.data import TRAIN, ProblemStream, Source, open_source
from rl.data.problem import Share
from rl.data.tokenizer import byte_level_bpe, of_characters
from rl.requests import eval_sampling, requests_for, sample_seed, train_sampling
from rollout.sampling import SamplingParams

settings.register_profile("rl", max_examples=60, deadline=None, derandomize=True)
quick = settings.get_profile("rl")


def stream(size: int = 7, seed: int = 3, name: int = 0) -> ProblemStream:
    return ProblemStream([f"p{i}" for i in range(size)], seed, name)  # type: ignore[arg-type]


@quick
@given(st.integers(1, 12), st.integers(0, 2**31 - 1), st.integers(0, 1), st.lists(st.integers(0, 9), max_size=6))
def test_order_is_a_function_of_the_cursor(size: int, seed: int, name: int, counts: list[int]) -> None:
    """However it is cut into steps, and wherever it is taken up again."""
    whole = stream(size, seed, name).take(sum(counts))
    pieces = stream(size, seed, name)
    assert [p for c in counts for p in pieces.take(c)] == whole
    for cursor in {0, len(whole) // 2, len(whole)}:
        resumed = stream(size, seed, name)
        resumed.cursor = cursor
        assert resumed.take(len(whole) - cursor) == whole[cursor:]


def test_each_epoch_is_another_permutation() -> None:
    s = stream(20)
    epochs = [tuple(s.take(20)) for _ in range(4)]
    assert len(set(epochs)) == 4 and all(len(set(e)) == 20 for e in epochs)


def test_seed_and_name_change_the_order() -> None:
    orders = {tuple(stream(30, seed, name).take(30)) for seed in (0, 1, 2) for name in (0, 1)}
    assert len(orders) == 6


Shares = list[tuple[int, int]]
shares = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=2, max_size=4)


def mixed(parts: Shares, seed: int, ranks: Sequence[float] = ()) -> ProblemStream:
    """Problems are (source, number)."""
    problems = [(i, j) for i, (size, _) in enumerate(parts) for j in range(size)]
    return ProblemStream(problems, seed, TRAIN, [Share(*part) for part in parts], ranks)  # type: ignore[arg-type]


@quick
@given(shares, st.integers(0, 2**31 - 1), st.lists(st.integers(0, 30), max_size=5))
def test_the_order_of_a_mixture_is_a_function_of_the_cursor(parts: Shares, seed: int, counts: list[int]) -> None:
    """However it is cut, and wherever it is taken up again; each block has its weights, each source its own epochs."""
    whole = mixed(parts, seed).take(sum(counts))
    pieces = mixed(parts, seed)
    assert [p for c in counts for p in pieces.take(c)] == whole
    for cursor in {0, 1, len(whole) // 2, len(whole)} & {*range(len(whole) + 1)}:
        resumed = mixed(parts, seed)
        resumed.cursor = cursor
        assert resumed.take(len(whole) - cursor) == whole[cursor:]
    block = sum(weight for _, weight in parts)
    for start in range(0, len(whole) - block + 1, block):
        taken = Counter(source for source, _ in whole[start : start + block])
        assert taken == {i: weight for i, (_, weight) in enumerate(parts)}
    for i, (size, _) in enumerate(parts):
        own = [number for source, number in whole if source == i]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))


def test_the_order_of_a_mixture_is_drawn() -> None:
    parts = [(20, 2), (20, 1)]
    orders = {tuple(mixed(parts, seed).take(60)) for seed in range(4)}
    assert len(orders) == 4
    sources = [source for source, _ in mixed(parts, 0).take(60)]
    assert len({tuple(sources[i : i + 3]) for i in range(0, 60, 3)}) == 3  # not always in one order
    first = [number for source, number in mixed(parts, 0).take(60) if source == 0]
    second = [number for source, number in mixed([(20, 1), (20, 1)], 0).take(40) if source == 1]
    assert first[:20] != first[20:40] and first[:20] != second


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 2**31 - 1))
def test_the_first_epoch_goes_by_rank(ranks: list[int], seed: int) -> None:
    problems = list(range(len(ranks)))
    ranked = ProblemStream(problems, seed, TRAIN, ranks=ranks)  # type: ignore[arg-type]
    plain = ProblemStream(problems, seed, TRAIN)  # type: ignore[arg-type]
    first, drawn = ranked.take(len(ranks)), plain.take(len(ranks))
    assert first == sorted(drawn, key=lambda p: ranks[p])  # type: ignore[call-overload]
    assert ranked.take(2 * len(ranks)) == plain.take(2 * len(ranks))


def source(*overrides: str) -> Source:
    return open_source(check(["data.problems=2000", *overrides])[0])


@pytest.fixture(scope="module")
def arithmetic() -> Source:
    return source()


def test_held_out_is_disjoint(arithmetic: Source) -> None:
    train, held = {p.prompt for p in arithmetic.train}, [p.prompt for p in arithmetic.held_out]
    assert train and held and not train & set(held)
    assert len(held) == len(set(held))
    assert 0.08 < len(held) / (len(train) + len(held)) < 0.17  # one in eight


def test_held_out_is_the_same_for_every_seed(arithmetic: Source) -> None:
    """What is held out is a function of the prompt: a model trained with one seed never saw another seed's held-out ones."""
    other = source("seed=1")
    assert not {p.prompt for p in other.held_out} & {p.prompt for p in arithmetic.train}
    assert [p.prompt for p in other.train] != [p.prompt for p in arithmetic.train]


def test_source_is_deterministic(arithmetic: Source) -> None:
    again = source()
    assert [p.prompt_ids for p in again.train] == [p.prompt_ids for p in arithmetic.train]
    assert again.tokenizer.files == arithmetic.tokenizer.files


def test_arithmetic_is_judged_by_its_verifier(arithmetic: Source) -> None:
    for problem in (*arithmetic.train[:300], *arithmetic.held_out):
        assert int(problem.answer) == eval(problem.prompt.rstrip("="))
        assert arithmetic.judge(problem, problem.answer) == 1.0
        assert arithmetic.judge(problem, str(int(problem.answer) + 1)) < 1.0
        assert arithmetic.tokenizer.decode(arithmetic.encode_solution(problem)) == problem.solution
        assert UNKNOWN_ID not in problem.prompt_ids


@pytest.mark.parametrize("text", ["", " ", "-", "--", "1-", "\x00", "9" * 5000, "ten", "nan", "1e999", "\ud7ff\u2028"])
def test_arithmetic_judge_takes_any_text(arithmetic: Source, text: str) -> None:
    assert 0.0 <= arithmetic.judge(arithmetic.train[0], text) < 1.0


# tokenizers -----------------------------------------------------------------------------------------------------------

UNKNOWN_ID = 2
CORPUS = ["the sum of one and two is three", "Janet’s ducks lay 16 eggs\n\nper day", "#### 18", "  spaces\ttabs"] * 3


@pytest.fixture(scope="module")
def bpe():
    return byte_level_bpe(CORPUS, 300)


@quick
@given(text=st.text())
def test_bpe_knows_any_text(bpe, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids, special=True) == text
    assert all(0 <= i < len(bpe) for i in ids)


@quick
@given(ids=st.lists(st.integers(0, 299), max_size=20))
def test_bpe_decodes_any_ids(bpe, ids: list[int]) -> None:
    assert isinstance(bpe.decode([i % len(bpe) for i in ids]), str)


def test_bpe_training_is_deterministic() -> None:
    made = [byte_level_bpe(CORPUS, 300) for _ in range(3)]
    assert made[0].files == made[1].files == made[2].files
    assert made[0].encode("<pad><eos>") == (0, 1) and made[0].ends == (1,)


@quick
@given(text=st.text(alphabet="ab \n\t'.é漢", max_size=30))
def test_characters_round_trip(text: str) -> None:
    tokenizer = of_characters(["ab \n\t'.é漢"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and UNKNOWN_ID not in ids
    assert tokenizer.decode(ids) == text


def test_unknown_character_is_one_token() -> None:
    tokenizer = of_characters(["abc"])
    assert tokenizer.encode("axb")[1] == UNKNOWN_ID


# requests -------------------------------------------------------------------------------------------------------------


def test_sample_seeds_are_distinct_and_fixed() -> None:
    seeds = [
        sample_seed(r, w, s, p, i)
        for r in (0, 1, 11)
        for w in ("train", "eval")
        for s in range(12)
        for p in range(12)
        for i in range(12)
    ]
    assert max(Counter(seeds).values()) == 1
    assert all(0 <= s < 2**63 for s in seeds)
    assert np.std([s / 2**63 for s in seeds]) == pytest.approx(12**-0.5, rel=0.03)  # spread over the whole range


def test_requests_do_not_depend_on_the_layout(arithmetic: Source) -> None:
    problems = list(arithmetic.train[:3])
    layouts = (["rollout.tp=1", "rollout.replicas=2", "rollout.pages=64"], ["rollout.tp=4", "trainer.world_size=1"])
    filters = ["rollout.top_k=9", "rollout.top_p=0.9", "rollout.min_p=0.05"]
    configs = [check([*o, "rollout.temperature=0.7", *filters])[0] for o in layouts]
    requests = [requests_for(problems, 4, train_sampling(c.rollout, (1,)), c.seed, "train", 5) for c in configs]
    assert requests[0] == requests[1]
    assert [r.id for r in requests[0]] == list(range(12))
    assert [r.prompt_ids for r in requests[0]] == [p.prompt_ids for p in problems for _ in range(4)]
    assert len({r.sampling.seed for r in requests[0]}) == 12
    assert {replace(r.sampling, seed=0) for r in requests[0]} == {
        SamplingParams(5, 0.7, 0, (1,), top_k=9, top_p=0.9, min_p=0.05)
    }


def test_evaluation_has_its_own_temperature_and_no_filters() -> None:
    config = check(["rollout.temperature=0.7", "rollout.top_k=9", "rollout.top_p=0.9", "eval.temperature=0.5"])[0]
    assert eval_sampling(config.eval, config.rollout.max_new_tokens, (1,)) == SamplingParams(5, 0.5, stop_ids=(1,))
