"""OPO: the baseline of least gradient variance, by response length (https://arxiv.org/abs/2505.23585)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import equal_groups


def opo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = r - sum(|o| r) / sum(|o|) over the question's responses, |o| their lengths in tokens.

    The optimal baseline weighs rewards by the squared norm of grad log pi, taken here as proportional to the length.
    `inputs.lengths` are needed. A question whose responses are all empty gets A = r: no token carries it.
    """
    rewards, lengths = inputs.rewards, inputs.lengths.double()
    total = lengths.sum(dim=1, keepdim=True).clamp(min=1)
    baseline = (lengths * rewards).sum(dim=1, keepdim=True) / total
    return (rewards - baseline).masked_fill(equal_groups(rewards), 0.0)
