"""The same bits on every card of a family: the hashes of hashes.py against those that are committed."""

import json

import pytest
import torch

from kernels.device import family_of
from kernels.gpu.card import card_of
from tests.kernels.gpu.calls import CUDA, not_launched
from tests.kernels.gpu.compile import awaited, expected_of
from tests.kernels.gpu.hashes import hashes

pytestmark = pytest.mark.gpu


def test_hashes_are_those_of_every_card_of_the_family() -> None:
    family = family_of(card_of(CUDA))
    expected, found = json.loads(expected_of(family).read_text()), dict(hashes(family))
    assert expected.keys() == found.keys() - awaited(family), (
        f"not the entries of {expected_of(family).name}: write it anew"
    )
    different = [
        f"{name}: {found[name][:16]} != {expected[name][:16]}" for name in expected if found[name] != expected[name]
    ]
    assert not different, f"{len(different)} of {len(found)} differ on {torch.cuda.get_device_name()}:\n" + "\n".join(
        different
    )
    assert not not_launched(family), "these kernels have no entry"
