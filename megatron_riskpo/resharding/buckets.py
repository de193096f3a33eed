"""Weights in pieces of bounded size, so that a sync never holds the whole model twice."""

from collections.abc import Iterable, Iterator

from torch import Tensor

NamedTensor = tuple[str, Tensor]


def bucketed(weights: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Lists of consecutive (name, tensor) pairs of at most `max_bytes` bytes each, in order; a larger tensor goes
    alone. Lazy: the next tensor is asked for only when the bucket before it has been taken or has room."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + num_bytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += num_bytes
    if bucket:
        yield bucket
