"""Says what an algorithm is: the keys that all have, and the two things that a step asks of it."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

from pydantic import Field

from rl.errors import UserError
from rl.samples import Group
from rl.section import Natural, Positive, Section
from trainer.batch import Batch
from trainer.loss import Loss

LossMean = Literal["token", "sequence", "constant"]


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
    overlong_buffer: Natural = Field(
        description="tokens before rollout.max_new_tokens in which a response loses more and more of its reward, at the end 1; "
        "0: none"
    )
    mask_overlong: bool = Field(description="leave samples that rollout.max_new_tokens cut off out of the loss")

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where keys do not combine."""
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

    def batch(self, groups: Sequence[Group]) -> Batch:
        """Makes the batch of a step: all samples, in order, with the advantage and the weight of each sampled token.

        Nothing here may come from a library's maths (tests/exact_maths.py): the batch decides bits of the weights.
        """
