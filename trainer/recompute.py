"""What a layer forgets in the forward pass and computes again in the backward pass. The same ops on the same inputs: the
same bits."""

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks

Checkpointing = Literal["none", "selective", "layer"]
"""What a layer keeps of its forward pass for the backward pass: all that its ops save; the outputs of matmuls and attention,
but not those of norms, rope and the gated product, which cost little to compute again; its inputs alone: one more forward."""


class _Recipe:
    """The outputs of one cheap function, when they are needed."""

    def __init__(self, function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[Any]) -> None:
        self._function, self._inputs = function, [_detached(x) for x in inputs]
        self._made: dict[int, torch.Tensor] = {}

    def take(self, i: int) -> torch.Tensor:
        if i not in self._made:
            with torch.no_grad():
                self._made = dict(enumerate(self._function(*self._inputs)))
        return self._made.pop(i)  # each output is asked for once; another time computes it again


class Forgetting:
    """Makes autograd save, inside this context, recipes in the place of the tensors that were given to `again`."""

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[weakref.ref[torch.Tensor], _Recipe, int]] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "Forgetting":
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._recipes = {}

    def again(
        self, outputs: Sequence[torch.Tensor], function: Callable[..., Sequence[torch.Tensor]], *inputs: Any
    ) -> None:
        """Notes how `outputs` come from `inputs`, so that the backward pass computes them again instead of keeping them."""
        recipe = _Recipe(function, inputs)
        for i, output in enumerate(outputs):
            self._recipes[id(output)] = weakref.ref(output), recipe, i

    def _pack(self, tensor: torch.Tensor) -> Any:
        known = self._recipes.get(id(tensor))
        if known is None or known[0]() is not tensor:  # an id is used again once its tensor is gone
            return tensor
        return known[1:]


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    recipe, i = packed
    return recipe.take(i)


def _detached(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_detached(y) for y in x)
    return x.detach() if isinstance(x, torch.Tensor) else x
