"""Holds what the algorithms have in common whose loss is the clipped one."""

from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from rl.algorithms.algorithm import AlgorithmSection
from rl.algorithms.regularisers import regularised
from trainer.loss import Loss, PolicyLoss

Keys = TypeVar("Keys", bound=AlgorithmSection)


class Clipped(Generic[Keys]):
    """Trains on the clipped policy loss, or on another with two bounds; `batch` is its heirs' to say."""

    clipped: ClassVar[Callable[[float, float], Loss]] = PolicyLoss

    def __init__(self, section: Keys, max_new_tokens: int) -> None:
        self.section, self.max_new_tokens = section, max_new_tokens

    @property
    def loss(self) -> Loss:
        """Returns the clipped loss, with the KL term and the entropy bonus that the keys ask for."""
        return regularised(type(self).clipped(self.section.clip_low, self.section.clip_high), self.section)
