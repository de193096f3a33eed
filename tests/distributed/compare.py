"""How far two sets of tensors, by the same names, are from each other."""

import torch
from torch import Tensor


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| in the 2-norm, all tensors as one vector."""
    assert a.keys() == b.keys()
    difference = torch.stack([(a[n] - b[n]).double().norm() for n in b]).norm()
    return float(difference / torch.stack([t.double().norm() for t in b.values()]).norm())


def worst_tensor(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The same for each tensor alone, the worst of them. One that is a thousand times smaller than the largest is
    measured against that (the gradient of a key bias is 0 but for rounding: attention does not see it)."""
    floor = 1e-3 * max(t.norm().item() for t in b.values())
    return max((a[n] - b[n]).norm().item() / max(b[n].norm().item(), floor) for n in b)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of any entry of any tensor, relative to the largest entry of all."""
    return float(max((a[n] - b[n]).abs().max() for n in b) / max(t.abs().max() for t in b.values()))
