"""The comparison that every other test rests on can fail."""

import pytest
import torch

from kernels.contract import same_bits
from tests.bits import assert_same_bits, sha256

_KINDS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
}


def _flipped(t: torch.Tensor, at: tuple[int, ...], bit: int) -> torch.Tensor:
    t = t.clone()
    t.view(_KINDS[t.dtype])[at] ^= (1 << bit) - ((1 << 64) if bit == 63 else 0)
    return t


@pytest.mark.parametrize(
    ("dtype", "bit"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.float64, 0), (torch.float64, 52)]
)
def test_one_flipped_bit_fails(dtype: torch.dtype, bit: int) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = _flipped(x, (1, 2), bit)
    assert_same_bits(x, x.clone())
    assert same_bits(x, x.clone()) and not same_bits(x, y)
    assert sha256([x]) == sha256([x.clone()]) != sha256([y])
    with pytest.raises(AssertionError, match=r"1 of 15 differ, first at \[1, 2\]"):
        assert_same_bits(x, y)


def test_the_message_says_where_and_what() -> None:
    actual, expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [-3.0, 8.0]])
    with pytest.raises(AssertionError) as error:
        assert_same_bits(actual, expected, "logits")
    assert str(error.value) == "logits: 2 of 4 differ, first at [1, 0]: 40400000 != c0400000 (3.0 against -3.0)"


def test_minus_zero_is_not_zero() -> None:
    with pytest.raises(AssertionError, match="80000000 != 00000000"):
        assert_same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
    assert not same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_nan_is_compared_by_payload() -> None:
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert_same_bits(quiet, quiet.clone())
    assert same_bits(quiet, quiet.clone())
    with pytest.raises(AssertionError, match="7fc00000 != 7fc00001"):
        assert_same_bits(quiet[:1], quiet[1:])


def test_shape_dtype_and_count_must_agree() -> None:
    x = torch.zeros(2, 3)
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(6)):
        assert not same_bits(x, other)
        with pytest.raises(AssertionError, match="against"):
            assert_same_bits(x, other)
    with pytest.raises(AssertionError, match="1 tensors against 2"):
        assert_same_bits((x,), (x, x))
    with pytest.raises(AssertionError, match=r"pair\[1\]: 6 of 6"):
        assert_same_bits((x, x), (x, x + 1), "pair")


def test_strides_are_no_difference() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert_same_bits(x.T.contiguous().T, x)
    assert_same_bits(torch.cat([x, x], 1)[:, 6:], x)
    assert sha256([x.T.contiguous().T]) == sha256([x])
