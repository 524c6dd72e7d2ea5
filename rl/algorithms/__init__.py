"""Algorithms: what each sampled token is worth, and by which loss it is trained on. `algorithm.name` of the config chooses one.

algorithm.py   what every algorithm is, and the keys that all have
grpo.py        GRPO (Shao et al. 2024), with the advantages of Dr. GRPO and RLOO and DAPO's loss mean and clipping

To add one: a file with its keys (an `AlgorithmSection` with a `name` of its own) and a class that has `batch` and `loss`; then
a line in `ALGORITHMS` below. It sees whole groups, may leave samples out of the loss by a weight of 0, and says the worth of
each token on its own. A loss of a new form goes to `trainer/loss.py`. Nothing else names an algorithm.
"""

from rl.algorithms.algorithm import Algorithm, AlgorithmSection
from rl.algorithms.grpo import Grpo, GrpoSection

ALGORITHMS = {"grpo": Grpo}
"""What `algorithm.name` stands for: made of its section and `rollout.max_new_tokens`."""

AnyAlgorithmSection = GrpoSection  # a second one: GrpoSection | OtherSection, with Field(discriminator="name")


def open_algorithm(section: AnyAlgorithmSection, max_new_tokens: int) -> Algorithm:
    """Makes the algorithm that a config names."""
    return ALGORITHMS[section.name](section, max_new_tokens)


__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmSection", "AnyAlgorithmSection", "open_algorithm"]
