from itertools import pairwise

import pytest
import torch

from megatron_riskpo.resharding.buckets import bucketed

SIZES = [3, 3, 4, 20, 1, 1, 8, 0, 9]


def weights():
    return [(f"w{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("max_bytes", [1, 6, 10, 1000])
def test_buckets_keep_order_stay_below_the_limit_and_are_full(max_bytes):
    buckets = list(bucketed(weights(), max_bytes))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in weights()]
    bytes_of = [sum(tensor.numel() for _, tensor in bucket) for bucket in buckets]
    assert all(size <= max_bytes or len(bucket) == 1 for bucket, size in zip(buckets, bytes_of, strict=True))
    # No bucket could have taken the next one's first tensor.
    assert all(
        size + bucket[0][1].numel() > max_bytes for size, (_, bucket) in zip(bytes_of, pairwise(buckets), strict=False)
    )


def test_no_tensor_is_made_before_it_is_needed():
    made = []

    def lazily():
        for name, tensor in weights():
            made.append(name)
            yield name, tensor

    buckets = bucketed(lazily(), max_bytes=6)
    assert len(next(buckets)) == 2
    assert made == ["w0", "w1", "w2"]  # the third showed that the bucket was full


def test_no_weights_are_no_buckets():
    assert list(bucketed([], 10)) == []
