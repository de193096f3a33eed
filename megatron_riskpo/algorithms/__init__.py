"""The objective: advantages, policy loss and their metrics, as pure tensor functions."""

from megatron_riskpo.algorithms.advantages import AdvantageOutputs, compute_advantages, validate_algorithm
from megatron_riskpo.algorithms.config import AlgorithmConfig, MismatchConfig, PolicyLossConfig
from megatron_riskpo.algorithms.diagnostics import cov_logprob_advantage
from megatron_riskpo.algorithms.mismatch import MismatchSums, mismatch_sums
from megatron_riskpo.algorithms.policy_loss import LossOutputs, loss_normalizer, policy_loss, validate_policy_loss
from megatron_riskpo.algorithms.quantiles import QuantileTracker
from megatron_riskpo.algorithms.token_inputs import TokenInputs

__all__ = [
    "AdvantageOutputs",
    "AlgorithmConfig",
    "LossOutputs",
    "MismatchConfig",
    "MismatchSums",
    "PolicyLossConfig",
    "QuantileTracker",
    "TokenInputs",
    "compute_advantages",
    "cov_logprob_advantage",
    "loss_normalizer",
    "mismatch_sums",
    "policy_loss",
    "validate_algorithm",
    "validate_policy_loss",
]
