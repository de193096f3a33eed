"""GRPO: rewards normalised within the question's group (https://arxiv.org/abs/2402.03300)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import EPS, centred


def grpo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = (r - mean) / (std + 1e-6) over the question's responses; needs two of them.

    The paper leaves open which std; it is the unbiased one (G - 1), as in TRL and verl, so that runs compare. Also the
    advantage of DAPO (https://arxiv.org/abs/2503.14476), whose changes are in the loss and in the sampling.
    """
    return centred(inputs.rewards) / (inputs.rewards.std(dim=1, keepdim=True) + EPS)
