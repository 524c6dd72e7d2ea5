"""Algorithms: what each sampled token is worth, and by which loss it is trained on. `algorithm=NAME` chooses one.

algorithm.py             what every algorithm is, and the keys that all have
advantages.py            what a reward is worth, against its group's or the batch's
overlong.py              the penalty and the filter of DAPO (Yu et al. 2025) for samples that are too long
shares.py                which samples count, and the share of each token in the mean of the loss
clipped.py               what the algorithms with the clipped policy loss have in common
grpo.py                  GRPO (Shao et al. 2024), with the advantages of Dr. GRPO and RLOO and DAPO's loss mean and clipping
reinforce_plus_plus.py   REINFORCE++ (Hu 2025), and its variant with a baseline
gspo.py                  GSPO (Zheng et al. 2025): the ratio of a whole sequence
cispo.py                 CISPO (MiniMax-M1 2025): a clipped importance weight
ppo.py                   PPO (Schulman et al. 2017) with a critic
distillation.py          on-policy distillation (Agarwal et al. 2024): a teacher grades every token
regularisers.py          of any of them: the KL term to a reference, in the loss or the rewards, and the entropy bonus

To add one: a file with its keys (an `AlgorithmSection` with a `name` of its own) and a class that has `batch` and `loss`; a
word in `ALGORITHMS` and in `AnyAlgorithmSection` below; a file of values in configs/algorithm. It sees whole groups, may leave
samples out of the loss by a weight of 0, and says the worth of each token on its own. A loss of a new form goes to
`trainer/loss.py`. Nothing else names an algorithm. docs/algorithms.md has formulas and papers.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from rl.algorithms.algorithm import Algorithm, AlgorithmSection
from rl.algorithms.cispo import Cispo, CispoSection
from rl.algorithms.distillation import Distillation, DistillationSection
from rl.algorithms.grpo import Grpo, GrpoSection
from rl.algorithms.gspo import Gspo, GspoSection
from rl.algorithms.ppo import Ppo, PpoSection
from rl.algorithms.reinforce_plus_plus import ReinforcePlusPlus, ReinforceSection

ALGORITHMS: dict[str, Callable[[Any, int], Algorithm]] = {
    "grpo": Grpo,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "gspo": Gspo,
    "cispo": Cispo,
    "distillation": Distillation,
    "ppo": Ppo,
}
"""What `algorithm.name` stands for: made of its section and `rollout.max_new_tokens`."""

AnyAlgorithmSection = Annotated[
    GrpoSection | ReinforceSection | GspoSection | CispoSection | DistillationSection | PpoSection,
    Field(discriminator="name"),
]


def open_algorithm(section: AlgorithmSection, max_new_tokens: int) -> Algorithm:
    """Makes the algorithm that a config names."""
    return ALGORITHMS[section.name](section, max_new_tokens)
