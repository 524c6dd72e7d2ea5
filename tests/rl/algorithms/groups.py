"""Groups of samples as an environment returns them."""

from collections.abc import Sequence

from rl.data import Problem
from rl.samples import Group, Sample
from rollout.sampling import Completion, SamplingParams

PLAIN = {
    **{
        "mini_batches": 1,
        "update_epochs": 1,
        "sampling_rounds": 1,
        "lag": 0,
        "overlong_buffer": 0,
        "mask_overlong": False,
    },
    **{
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "kl_in": "loss",
        "reference": None,
        "entropy_coef": 0.0,
        "device_map": None,
    },
}
"""The keys of an algorithm that change nothing."""


def group(sizes: list[list[int]], rewards: Sequence[float | None], end: str = "stop") -> Group:
    """Samples of one problem; `sizes`: of each sample's completions, between which two tokens are given. `end`: of the last."""
    samples = []
    for of_turns, reward in zip(sizes, rewards, strict=True):
        ends = ["stop"] * (len(of_turns) - 1) + [end]
        turns = [
            Completion(0, (7,) * n, (-0.5,) * n, how, 0, SamplingParams(9, 0.7))  # type: ignore[arg-type]
            for n, how in zip(of_turns, ends, strict=False)
        ]
        samples.append(Sample(tuple(x for turn in turns for x in ((1, 2), turn)), "", reward))
    return Group(Problem("p", "", (1, 2), "", "", None), tuple(samples))
