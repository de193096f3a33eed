"""Rows of tensors in files, against torch's own slices of the same tensors; pieces as ranks write them, cut in both
dimensions."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.checkpoint import rows as rows_module
from megatron_riskpo.checkpoint.copy import Copy, run_copies
from megatron_riskpo.checkpoint.rows import (
    Block,
    RowReader,
    Rows,
    StoredTensor,
    byte_ranges,
    check_reordered,
    first_numbers,
    runs_of,
)
from megatron_riskpo.errors import RunError


def store(tensor: torch.Tensor, path, row_cuts, column_cuts) -> StoredTensor:
    """Write the pieces one after the other, last first, with a gap before each."""
    width = tensor[0].numel() * tensor.element_size()
    content = tensor.contiguous().view(torch.uint8).reshape(len(tensor), width)
    blocks = []
    with path.open("wb") as file:
        bounds = itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(column_cuts))
        for (top, bottom), (left, right) in reversed(list(bounds)):
            file.write(b"gap")
            place = Block(path, file.tell(), top, bottom - top, left, right - left)
            file.write(content[top:bottom, left:right].contiguous().numpy().tobytes())
            blocks.append(place)
    return StoredTensor("t", tensor.dtype, tuple(tensor.shape), tuple(blocks))


def as_tensor(blocks, dtype, shape) -> torch.Tensor:
    content = bytearray(b"".join(block.tobytes() for block in blocks))
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 23),
    width=st.integers(1, 9),
    row_cut=st.integers(1, 22),
    column_cut=st.integers(0, 8),
    seed=st.integers(0, 2**32),
    block_bytes=st.sampled_from([1, 40, 100, 2**20]),
)
def test_any_order_of_rows_is_read_and_copied(
    tmp_path_factory, num_rows, width, row_cut, column_cut, seed, block_bytes
):
    folder = tmp_path_factory.mktemp("rows")
    tensor = torch.randn(num_rows, width)
    row_cuts = sorted({0, min(row_cut, num_rows), num_rows})
    stored = store(tensor, folder / "source", row_cuts, sorted({0, min(column_cut, width) * 4, width * 4}))
    numbers = list(range(num_rows))
    random.Random(seed).shuffle(numbers)
    rows = Rows("t", runs_of(torch.tensor(numbers), [stored]))
    expected = tensor[numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK_BYTES", block_bytes)
        assert torch.equal(as_tensor(RowReader().blocks(rows), rows.dtype, rows.shape), expected)
        assert (byte_ranges(rows) is None) == (len({block.column for block in stored.blocks}) > 1)
        for dtype in (torch.float32, torch.bfloat16):
            (folder / "target").write_bytes(b"before")
            run_copies([Copy(rows, dtype, folder / "target", 6)])
            content = (folder / "target").read_bytes()
            assert content[:6] == b"before"
            assert torch.equal(
                torch.frombuffer(bytearray(content[6:]), dtype=dtype).reshape(rows.shape), expected.to(dtype)
            )


def test_runs_do_not_go_from_one_tensor_to_the_next(tmp_path):
    tensors = [store(torch.randn(n, 2), tmp_path / str(n), [0, n], [0, 8]) for n in (3, 4)]
    numbers = torch.cat(
        [torch.arange(first, first + t.num_rows) for first, t in zip(first_numbers(tensors), tensors, strict=True)]
    )
    runs = runs_of(numbers, tensors)
    assert [(run.tensor is tensors[i], run.start, run.stop) for i, run in enumerate(runs)] == [
        (True, 0, 3),
        (True, 0, 4),
    ]


@pytest.mark.parametrize("fused", [[0, 1, 1], [0, 1], [[2, 1, 0]]])
def test_a_fusion_that_does_more_than_reorder_is_refused(fused):
    check_reordered(torch.arange(3), torch.tensor([2, 0, 1]), "key")
    with pytest.raises(RunError, match="key: its family's table does more than reorder rows"):
        check_reordered(torch.arange(3), torch.tensor(fused), "key")
