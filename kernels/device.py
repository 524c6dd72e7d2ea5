"""Which implementation of an op runs: the one of the tensor's device and, on a GPU, of the card's family. Or an error.

| device | modules of `kernels/ops/NAME`, the first that is there |
|---|---|
| cpu | cpu |
| a card of the Hopper family | hopper (Gluon: TMA and wgmma; it may take kernels of portable), portable (plain Triton) |
| any other card of `FAMILIES` | portable |
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import torch

from kernels.gpu import card as cards
from kernels.gpu.card import FAMILIES, Card, card_of, choose_family

MODULES = {"cpu": ("cpu",), "hopper": ("hopper", "portable"), "portable": ("portable",)}
"""By device or family of cards: the modules of an op that may implement it, the first one that the op has."""


class UnsupportedError(RuntimeError):
    """Says that an op, shape, dtype, device or card has no exact implementation. There is no fallback."""


def stand_in(device_type: str, card: Card) -> None:
    """Sends tensors of `device_type` to the implementations for `card` for the rest of this process, which must run none of
    them: gpu/ahead.py compiles what they would launch."""
    cards.stand_in(device_type, card)
    implementation.cache_clear()


def family_of(card: Card, where: str = "card") -> str:
    """Returns the family whose kernels a card runs; UnsupportedError, which names the card, where there are none."""
    if card.family is None:
        known = ", ".join(f"{a}.{b}" for a, b in FAMILIES)
        major, minor = card.capability
        raise UnsupportedError(
            f"{where} is {card.name} of compute capability {major}.{minor}; the GPU kernels are for {known}: use "
            f"device=cpu, or hide that card with CUDA_VISIBLE_DEVICES"
        )
    return card.family


def check_cards() -> None:
    """Raises UnsupportedError, which names card or version, unless every visible card can run the GPU kernels."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "device=cuda: torch sees no CUDA device: use device=cpu, or install a torch for this driver"
        )
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        family_of(Card(name, capability, 0, 0), f"card {index}")  # sizes are read where a kernel needs them
    try:
        import_module("kernels.gpu.dialect")  # refuses a Triton that it does not know
    except ImportError as error:  # older than what it is written in, or none
        version = getattr(sys.modules.get("triton"), "__version__", None)
        what = (
            f"triton {version} is not one that samebit's kernels were compiled with"
            if version
            else "there is no triton"
        )
        raise UnsupportedError(
            f"{what} ({error}): install the torch that pyproject.toml asks for, and the triton that it brings"
        ) from None


def choose_device(asked: str, say: Callable[[str], None], family: str = "auto") -> str:
    """Returns cpu or cuda. `auto`: the GPU where there is one; `say` is told why a card that is there is not used. This process
    then runs the kernels of `family`; UnsupportedError where there are none of it on the device."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return _on_cpu(family)
    try:
        check_cards()
    except UnsupportedError as error:
        if asked != "auto":
            raise
        say(f"using the CPU: {error}")
        return _on_cpu(family)
    choose_family(family)
    return "cuda"


def _on_cpu(family: str) -> str:
    if family != "auto":
        raise UnsupportedError(f"{family} is a family of GPU kernels: ask for device=cuda, or leave it at auto")
    return "cpu"


@cache
def implementation(op: str, device: torch.device) -> ModuleType:
    """Returns the module that implements `op` on a device; UnsupportedError, which names both, where there is none."""
    if device.type == "cuda" or cards.stands_for(device.type):
        where = family_of(card_of(device))
        what = f"{where.capitalize()} cards"
    else:
        where, what = device.type, f"device {device.type!r}"
    for module in MODULES.get(where, ()):
        if find_spec(name := f"kernels.ops.{op}.{module}"):
            return import_module(name)
    have = [d for d, modules in MODULES.items() if any(find_spec(f"kernels.ops.{op}.{m}") for m in modules)]
    raise UnsupportedError(f"{op} has no exact implementation for {what}; it runs on {', '.join(have)}")


def same_device(op: str, *tensors: torch.Tensor) -> ModuleType:
    """Returns the implementation for tensors that must all be on one device."""
    kinds = {t.device for t in tensors}
    if len(kinds) != 1:
        raise UnsupportedError(f"{op}: tensors on {sorted(map(str, kinds))}; put them on one device")
    return implementation(op, tensors[0].device)


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the gradient that an op returns for `weight`: float32 for a float32 master, and for a copy
    of it that was rounded beforehand and says so (`Tensor.grad_dtype`). Ask in the forward pass: what autograd saved
    has forgotten it."""
    return (weight.grad_dtype or weight.dtype) if weight.is_leaf else weight.dtype


def check_groups(op: str, groups: torch.Tensor, rows: int) -> None:
    """Raises UnsupportedError unless `groups` are int64 offsets 0 <= ... <= rows, ascending, of at least one group."""
    offsets = groups.tolist()
    ascending = all(a <= b for a, b in pairwise(offsets))
    if groups.dtype != torch.int64 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != rows or not ascending:
        raise UnsupportedError(
            f"{op}: groups must be int64 offsets that ascend from 0 to the {rows} rows, got {groups.dtype} {offsets[:8]} "
            f"that end at {offsets[-1] if offsets else None}"
        )
