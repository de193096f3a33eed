"""RMSNorm for the layer spec without TransformerEngine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm that may be used under sequence parallelism.

    Megatron's WrappedTorchNorm refuses sequence parallelism. There each rank sees a part of the sequence, so the
    weight's gradient has to be summed over the tensor-parallel ranks: the `sequence_parallel` mark on the weight
    tells Megatron's finalize_model_grads to do so.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
