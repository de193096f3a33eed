"""What most estimators share: the group of responses to one question, and its mean."""

from jaxtyping import Bool, Float64
from torch import Tensor

# Added to every standard deviation that is divided by, as in TRL and verl, so that runs compare.
EPS = 1e-6


def equal_groups(rewards: Float64[Tensor, "num_prompts group_size"]) -> Bool[Tensor, "num_prompts 1"]:
    """Questions whose responses all have the same reward: they tell nothing about which response is better."""
    lowest, highest = rewards.aminmax(dim=1, keepdim=True)
    return lowest == highest


def centred(rewards: Float64[Tensor, "num_prompts group_size"]) -> Float64[Tensor, "num_prompts group_size"]:
    """r - mean of the question's responses; exactly 0 where all of them are equal."""
    # The mean of equal numbers can be off by a rounding error, which a division by their spread would blow up.
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal_groups(rewards), 0.0)
