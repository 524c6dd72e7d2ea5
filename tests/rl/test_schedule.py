"""The learning rate of each step: against torch's schedulers, and the same float64 on every machine."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.schedule import Kind, Schedule

KINDS: tuple[Kind, ...] = ("constant", "linear", "cosine")


def of_torch(kind: Kind, lr: float, steps: int) -> list[float]:
    """What torch makes of it, without a warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    }[kind]()
    out = []
    for _ in range(steps):
        out.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return out


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(1e-7, 1), st.integers(1, 60), st.integers(0, 20))
def test_as_torch_after_the_warm_up(kind: Kind, lr: float, steps: int, warmup: int) -> None:
    schedule = Schedule(lr, kind, warmup, warmup + steps)
    rising = [schedule(step) for step in range(1, warmup + 1)]
    assert rising == pytest.approx([lr * step / warmup for step in range(1, warmup + 1)], rel=1e-15)
    falling = [schedule(step) for step in range(warmup + 1, warmup + steps + 1)]
    assert falling == pytest.approx(of_torch(kind, lr, steps), rel=1e-6, abs=lr * 1e-7)
    assert max(rising + falling) == lr and min(rising + falling) > 0


def test_the_usual_one_is_the_number_of_the_config() -> None:
    assert {Schedule(1e-4, "constant", 0, 250)(step) for step in (1, 2, 250, 251)} == {1e-4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 3, 7])
def test_a_run_that_ends_within_its_warm_up(kind: Kind, steps: int) -> None:
    assert [Schedule(1.0, kind, 7, steps)(step) for step in range(1, steps + 1)] == [
        step / 7 for step in range(1, steps + 1)
    ]


def test_the_cosine_is_the_float32_that_is_nearest() -> None:
    """Of 200 decimals, and squared without a rounding that a CPU chooses; it keeps its digits to the last of many steps."""
    for steps in (2, 3, 100, 10**6):
        for step in {2, steps // 2 + 1, steps}:
            angle = math.pi / 2 * ((step - 1) / steps)
            with mpmath.workdps(200):
                exact = mpmath.cos(mpmath.mpf(angle))
            nearest = float(np.float32(float(exact)))
            assert abs(exact - nearest) <= np.spacing(np.float32(nearest)) / 2
            assert Schedule(1.0, "cosine", 0, steps)(step) == nearest * nearest > 0
