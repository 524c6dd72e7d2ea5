"""The card: what the kernels ask of a GPU. Sizes are read from the device; no kernel has them as numbers."""

from dataclasses import dataclass
from functools import cache

import torch

FAMILIES = {(9, 0): "hopper"}
"""By compute capability: the cards that have kernels. A family runs the modules of an op that `kernels.device` lists for it."""


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
        return FAMILIES.get(self.capability)


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
