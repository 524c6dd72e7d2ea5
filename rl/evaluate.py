"""Evaluates the policy on held-out problems, by the reward that it is trained on."""

import math
from dataclasses import dataclass

from rich.console import Console

from rl.cluster import RolloutFleet
from rl.config import RunConfig
from rl.data import Source
from rl.handover import Handover
from rl.publish import check_served
from rl.requests import eval_sampling, requests_for
from rl.rewards.reward import Reward
from rl.run.screen import Waiting
from rl.score import score


@dataclass(frozen=True)
class Evaluation:
    accuracy: float  # share of the problems whose completion earns 1 or more
    reward: float  # mean over the problems

    def metrics(self) -> dict[str, float]:
        return {"eval/accuracy": self.accuracy, "eval/reward": self.reward}


def evaluate(
    config: RunConfig, source: Source, reward: Reward, rollout: RolloutFleet, cards: Handover, console: Console
) -> Evaluation:
    """Samples one completion of each of the first `eval.problems` held-out problems; says what they earn, and by what."""
    problems = source.held_out[: config.eval.problems]
    sampling = eval_sampling(config, source.tokenizer.ends)
    requests = requests_for(problems, 1, sampling, config.seed, "eval", 0)
    with Waiting(console, f"evaluating on {len(problems):,} held-out problems"):
        cards.to_rollout()
        check_served(rollout)
        completions = rollout.generate(requests)
    earned = [score(p, [c], source, reward)[0].reward for p, c in zip(problems, completions, strict=True)]
    right, count = sum(r >= 1 for r in earned), len(earned)
    found = Evaluation(right / count, math.fsum(earned) / count)
    console.print(
        f"held-out accuracy {found.accuracy:.3f} ({right} of {count} earn 1, mean reward {found.reward:.3f}, by {reward.name}; "
        f"temperature {config.eval.temperature})",
        soft_wrap=True,
    )
    return found
