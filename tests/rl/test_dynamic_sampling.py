"""Dynamic sampling: which groups a step trains on, whatever their rewards are."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rl.dynamic_sampling import draw_groups
from rl.samples import Group
from tests.rl.algorithms.groups import group

REWARDS = st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=2, max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(REWARDS, min_size=20, max_size=20), st.integers(1, 4), st.integers(1, 5))
def test_which_groups_are_kept(stream: list[list[float | None]], wanted: int, rounds: int) -> None:
    asked: list[tuple[int, int]] = []

    def draw(first: int, count: int) -> list[Group]:
        asked.append((first, count))
        return [group([[1]] * len(r), r) for r in stream[first : first + count]]

    drawn = draw_groups(draw, wanted, rounds)
    teaches = [len({x for x in r if x is not None}) > 1 for r in stream]
    # as the text has it: round for round, as many as are missing
    taken = 0
    for done in range(1, rounds + 1):
        missing = wanted - sum(teaches[:taken])
        assert asked[done - 1] == (taken, missing)
        taken += missing
        if sum(teaches[:taken]) == wanted:
            break
    assert len(asked) == drawn.rounds == done and drawn.dropped == taken - wanted
    silent = [i for i in range(taken) if not teaches[i]]
    fill = silent[: wanted - sum(teaches[:taken])]
    kept = [i for i in range(taken) if teaches[i] or i in fill]
    assert [g.rewards for g in drawn.groups] == [stream[i] for i in kept] and len(kept) == wanted


def test_one_round_is_the_step_as_it_is() -> None:
    """The order too: what has no signal stays where it stands."""
    groups = [group([[1], [1]], [r, 1.0]) for r in (1.0, 0.0, 1.0)]
    drawn = draw_groups(lambda first, count: groups[first : first + count], 3, 1)
    assert drawn.groups == groups and drawn.metrics() == {"sampling/rounds": 1, "sampling/groups_dropped": 0}
