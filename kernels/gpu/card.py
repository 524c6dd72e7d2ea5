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
    (10, 0): "portable",  # B200, GB200
    (10, 3): "portable",  # B300, GB300
    (12, 0): "portable",  # RTX 5090, RTX PRO 6000
    (12, 1): "portable",  # GB10
}
"""By compute capability: the cards that have kernels. A family runs the modules of an op that `kernels.device` lists for it.
Not here: cards before 8.0, whose tensor cores take no bfloat16, and 11.0 (Thor), which some of the Tritons that are accepted
take for a card of the 10s and others do not."""
ALL_FAMILIES = ("hopper", "portable")

_chosen: list[str] = []


@dataclass(frozen=True)
class Card:
    """Describes a GPU. `shared_memory`: bytes that a block may ask for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    def warps(self, wanted: int, rows: int) -> int:
        """Returns `wanted` warps for a product whose tile has so many rows, or, on the 10s, the number nearest to it for which
        Triton takes mma.sync, as it does on other cards: there 4 or 8 warps and a multiple of 64 rows would give tcgen05."""
        return {4: 2, 8: 16}.get(wanted, wanted) if self.capability[0] == 10 and rows % 64 == 0 else wanted

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
    103: Card("B300", (10, 3), 148, 232_448),
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


def chosen_family() -> str:
    """Returns the family that this process was told to run, or auto."""
    return _chosen[0] if _chosen else "auto"


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
