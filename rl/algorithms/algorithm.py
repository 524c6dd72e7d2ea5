"""Says what an algorithm is: the keys that all have, and the two things that a step asks of it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from rl.errors import UserError
from rl.hosted.loading import check_device_map
from rl.samples import Group
from rl.section import Folder, Natural, Positive, Section
from trainer.batch import Batch
from trainer.loss import KlEstimator, Loss


def _device_map(value: Any) -> Any:
    try:
        if value is not None:
            check_device_map(value)
    except ValueError as error:
        raise PydanticCustomError("device_map", "{reason}", {"reason": str(error)}) from None
    return value


DeviceMap = Annotated[Any, AfterValidator(_device_map)]
LossMean = Literal["token", "sequence", "constant"]


class FrozenAsked(NamedTuple):
    """Names a model that an algorithm asks for log-probs and does not train."""

    key: str  # that says where it is
    path: str | None  # None: the weights that RL begins with
    device_map: Any = None  # None: the exact kernels compute it, in the trainer's ranks


class CriticAsked(NamedTuple):
    """Says how a critic is trained."""

    loss: Loss
    lr: float  # at its highest


class AlgorithmSection(Section):
    """Holds the keys that every algorithm has."""

    name: str = Field(description="one of rl/algorithms")
    prompts_per_step: Positive = Field(description="problems of a step")
    group_size: Annotated[int, Field(ge=2)] = Field(description="samples of each prompt")
    loss_mean: LossMean = Field(
        description="over what the loss is a mean: all tokens, each sequence's own, or a constant"
    )
    clip_low: float = Field(ge=0, le=1, description="the policy ratio is clipped below 1 - clip_low")
    clip_high: float = Field(ge=0, description="and above 1 + clip_high")
    mini_batches: Positive = Field(description="equal parts that a step's prompts are cut into; an update on each")
    update_epochs: Annotated[int, Field(gt=0, le=1000)] = Field(
        description="passes over a step's samples; the updates after the first are off-policy"
    )
    sampling_rounds: Positive = Field(
        description="most rounds of sampling in a step: as many further problems as had groups whose rewards are all equal "
        "(dynamic sampling); 1: none"
    )
    lag: Natural = Field(
        description="steps that sampling is ahead: those of step s are drawn by the weights after step max(0, s - 1 - lag), "
        "while earlier ones are trained on (cluster.placement=split); 0: by the newest"
    )
    overlong_buffer: Natural = Field(
        description="tokens before rollout.max_new_tokens in which a response loses more and more of its reward, at the end 1; "
        "0: none"
    )
    mask_overlong: bool = Field(description="leave samples that rollout.max_new_tokens cut off out of the loss")

    kl_coef: float = Field(
        ge=0, description="of the KL divergence from the reference, in the loss or the reward; 0: none"
    )
    kl_estimator: KlEstimator = Field(
        description="of that divergence, from the sampled token's log-probs (Schulman 2020)"
    )
    kl_in: Literal["loss", "reward"] = Field(
        description="loss: added to that of each token; reward: taken from the reward of each token"
    )
    reference: Folder | None = Field(
        description="model directory of the reference; null: the weights that RL begins with, after the warm start"
    )
    device_map: DeviceMap = Field(
        description="of the reference or teacher: null: the exact kernels compute it, in the trainer's ranks; else "
        "transformers does, in its own arithmetic, placed by accelerate: auto (the cards of a node that no rank has), cpu, "
        "cuda:1, {...}"
    )

    entropy_coef: float = Field(
        ge=0, description="of the entropy that is added to the objective, as the sampled tokens estimate it; 0: none"
    )

    @property
    def frozen(self) -> FrozenAsked | None:
        """Returns which model beside the policy is asked for log-probs; None where none is."""
        return FrozenAsked("algorithm.reference", self.reference, self.device_map) if self.kl_coef else None

    @property
    def critic(self) -> CriticAsked | None:
        """Returns how a critic is trained; None where there is none."""
        return None

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where keys do not combine."""
        if self.reference and not self.kl_coef:
            raise UserError(
                f"algorithm.reference={self.reference} with algorithm.kl_coef=0: nothing would ask it; set algorithm.kl_coef"
            )
        if self.device_map is not None and (self.frozen is None or self.frozen.path is None):
            key = self.frozen.key if self.frozen else "algorithm.reference"
            raise UserError(
                f"algorithm.device_map={self.device_map} with {key}=null: it places a model directory that transformers "
                f"computes; set {'' if self.frozen else 'algorithm.kl_coef and '}{key}, or leave it null"
            )
        if self.kl_coef and self.kl_in == "reward" and self.sampling_rounds > 1:
            raise UserError(
                f"algorithm.sampling_rounds={self.sampling_rounds} with algorithm.kl_in=reward: a group whose rewards are all "
                f"equal is told apart by the KL term; set algorithm.kl_in=loss or algorithm.sampling_rounds=1"
            )
        if self.prompts_per_step % self.mini_batches:
            raise UserError(
                f"algorithm.prompts_per_step={self.prompts_per_step} is no multiple of "
                f"algorithm.mini_batches={self.mini_batches}"
            )
        if self.overlong_buffer > max_new_tokens:
            raise UserError(
                f"algorithm.overlong_buffer={self.overlong_buffer} tokens before rollout.max_new_tokens={max_new_tokens}: it "
                f"must not be above that"
            )


class Algorithm(Protocol):
    """Turns a step's samples into a batch and says by which loss it is trained on."""

    @property
    def loss(self) -> Loss:
        """Returns the loss of each row, before its weight."""

    def batch(
        self, groups: Sequence[Group], reference: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> Batch:
        """Makes the batch of a step: all samples, in order, with the advantage and the weight of each sampled token.
        `reference`: float32 [R], the frozen model's log-probs of these tokens, where the section asks for one;
        `values`: likewise what the critic says before each.

        Nothing here may come from a library's maths (tests/exact_maths.py): the batch decides bits of the weights.
        """
