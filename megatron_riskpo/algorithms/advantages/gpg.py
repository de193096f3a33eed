"""GPG: group policy gradient (https://arxiv.org/abs/2504.02546)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import centred, equal_groups


def gpg(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = a (r - mean over the question), a = number of questions / number of those with unequal rewards.

    a keeps the size of the step when questions of equal rewards, which teach nothing, fill the batch. The paper's loss
    is -A log pi: loss.kind = reinforce.
    """
    num_unequal = int((~equal_groups(inputs.rewards)).sum())
    return centred(inputs.rewards) * (inputs.rewards.size(0) / max(num_unequal, 1))
