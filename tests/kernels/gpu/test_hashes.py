"""The same bits on every Hopper card: the hashes of hashes.py against those that are committed."""

import json

import pytest
import torch

from tests.kernels.gpu.calls import not_launched
from tests.kernels.gpu.hashes import EXPECTED, hashes

pytestmark = pytest.mark.gpu


def test_hashes_are_those_of_every_hopper_card() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the hashes are those of Hopper cards")
    expected, found = json.loads(EXPECTED.read_text()), dict(hashes())
    assert expected.keys() == found.keys(), f"not the entries of {EXPECTED.name}: write it anew"
    different = [
        f"{name}: {found[name][:16]} != {expected[name][:16]}" for name in found if found[name] != expected[name]
    ]
    assert not different, f"{len(different)} of {len(found)} differ on {torch.cuda.get_device_name()}:\n" + "\n".join(
        different
    )
    assert not not_launched(), "these kernels have no entry"
