"""The card: what the kernels ask of a GPU. Sizes are read from the device; no kernel has them as numbers."""

from dataclasses import dataclass
from functools import cache

import torch

FAMILIES = {
    (8, 0): "portable",  # A100
    (8, 6): "portable",  # A10, RTX 3090
    (8, 7): "portable",  # Orin
    (8, 9): "portable",  # L4, L40S, RTX 4090
    (9, 0): "hopper",  # H100, H200
    (12, 0): "portable",  # RTX 5090, RTX PRO 6000
    (12, 1): "portable",  # GB10
}
"""By compute capability: the cards that have kernels. A family runs the modules of an op that `kernels.device` lists for it.
Not here: cards before 8.0, whose tensor cores take no bfloat16, and 10.0 and 10.3 (B200, B300), for which the compiler chooses
between two kinds of matrix instruction that nobody has shown to have the same bits."""
ALL_FAMILIES = ("hopper", "portable")

_chosen: list[str] = []


@dataclass(frozen=True)
class Card:
    """Describes a GPU. `shared_memory`: bytes that a block may ask for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def family(self) -> str | None:
        """Returns the name of its family; None for a card that has no kernels."""
        own = FAMILIES.get(self.capability)
        return _chosen[0] if own and _chosen else own


KNOWN = {
    80: Card("A100", (8, 0), 108, 166_912),
    86: Card("A10", (8, 6), 72, 101_376),
    89: Card("L4", (8, 9), 58, 101_376),
    90: Card("H100", (9, 0), 132, 232_448),
    100: Card("B200", (10, 0), 148, 232_448),
    120: Card("RTX 5090", (12, 0), 170, 101_376),
}
"""One card of each compute capability, to compile for where it is not there. Multiprocessors are those of NVIDIA's data sheets;
shared memory is the maximum per multiprocessor less 1 KiB (CUDA C++ Programming Guide, table of technical specifications)."""


def choose_family(name: str) -> None:
    """Makes the cards of this process run the kernels of a family: their own (`auto`), or `portable`, which any of them runs.
    Every process of a run does so before its first op, as the run's config says. ValueError where another family is chosen
    already: their kernels would have to agree."""
    if name not in ("auto", *ALL_FAMILIES):
        raise ValueError(f"there is no family {name!r} of kernels: auto, {', '.join(ALL_FAMILIES)}")
    if _chosen and _chosen != [name]:
        raise ValueError(f"this process runs the kernels of family {_chosen[0]}: it cannot go on with those of {name}")
    if name != "auto" and not _chosen:
        _chosen.append(name)


_stand_ins: dict[str, Card] = {}


def stand_in(device_type: str, card: Card) -> None:
    """Lets devices of a type stand for `card` in this process, which compiles for it and runs nothing."""
    _stand_ins[device_type] = card
    card_of.cache_clear()


def stands_for(device_type: str) -> Card | None:
    """Returns the card for which devices of a type stand in this process; None where they are what they are."""
    return _stand_ins.get(device_type)


@cache
def card_of(device: torch.device) -> Card:
    """Reads the card of a CUDA device, once."""
    if (card := _stand_ins.get(device.type)) is not None:
        return card
    from triton.runtime import driver  # a machine without a GPU may lack it

    index = torch.cuda.current_device() if device.index is None else device.index
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    sizes = driver.active.utils.get_device_properties(index)
    return Card(name, capability, sizes["multiprocessor_count"], sizes["max_shared_mem"])
