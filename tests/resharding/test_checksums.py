"""The checksum is the sum that its docstring says, and changes with numbers and their places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.resharding import checksums
from megatron_riskpo.resharding.checksums import checksum

TYPES = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_the_weighted_sum_of_the_bits(dtype, monkeypatch):
    monkeypatch.setattr(checksums, "_CHUNK", 7)
    tensor = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = tensor.flatten().view(TYPES[dtype]).tolist()
    expected = sum(bit * (2 * i + 1) for i, bit in enumerate(bits)) % 2**64
    assert int(checksum(tensor)) % 2**64 == expected
    assert int(checksum(tensor[:0])) == 0


@given(st.integers(0, 99), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_one_changed_bit_changes_it(place, bit):
    tensor = torch.arange(100, dtype=torch.float32)
    before = checksum(tensor)
    tensor.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 2**bit
    assert checksum(tensor) != before


def test_two_numbers_that_change_places_change_it():
    tensor = torch.arange(100, dtype=torch.float32)
    assert checksum(tensor) != checksum(tensor.flip(0))
