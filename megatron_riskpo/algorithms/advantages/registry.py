"""All advantage estimators by the name that `algorithm.estimator` takes. A new one is a file and a line here."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_riskpo.algorithms.advantages.contract import Estimator, pointwise
from megatron_riskpo.algorithms.advantages.dr_grpo import dr_grpo
from megatron_riskpo.algorithms.advantages.gpg import gpg
from megatron_riskpo.algorithms.advantages.grpo import grpo
from megatron_riskpo.algorithms.advantages.opo import opo
from megatron_riskpo.algorithms.advantages.pass_at_k import check_k
from megatron_riskpo.algorithms.advantages.passk import passk
from megatron_riskpo.algorithms.advantages.pkpo import check_pkpo, pkpo
from megatron_riskpo.algorithms.advantages.qae import check_qae, qae
from megatron_riskpo.algorithms.advantages.reinforce_pp import reinforce_pp
from megatron_riskpo.algorithms.advantages.riskpo import (
    BUNDLE_OPTIONS,
    check_riskpo,
    cvar_bundle,
    mean_bundle,
    risk_seeking,
    riskpo,
)
from megatron_riskpo.algorithms.advantages.riskpo_reference import riskpo_reference
from megatron_riskpo.algorithms.advantages.rloo import rloo
from megatron_riskpo.algorithms.advantages.rs_grpo import rs_grpo

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "riskpo": Estimator(
            "risk weight psi(S) of bundle scores S, any spectrum, Mixed Value-at-Risk by default; "
            "pair with loss.kind = gspo (arXiv 2510.00911)",
            riskpo,
            BUNDLE_OPTIONS | {"spectrum", "k"},
            check=check_riskpo,
        ),
        "mean_bundle": Estimator(
            "riskpo with the mean for a risk measure: what the bundles alone do (arXiv 2510.00911)",
            mean_bundle,
            BUNDLE_OPTIONS,
            check=check_riskpo,
        ),
        "cvar_bundle": Estimator(
            "riskpo with the mean of the bundle scores below the alpha quantile (arXiv 2510.00911)",
            cvar_bundle,
            BUNDLE_OPTIONS,
            check=check_riskpo,
        ),
        "risk_seeking": Estimator(
            "riskpo with the mean of the bundle scores above the beta quantile; entropy collapses (arXiv 2510.00911)",
            risk_seeking,
            BUNDLE_OPTIONS,
            check=check_riskpo,
        ),
        "riskpo_reference": Estimator(
            "the released code's arithmetic, for comparison; pair with loss.kind = ppo, loss.dual_clip = 3 "
            "(arXiv 2510.00911)",
            riskpo_reference,
            frozenset({"bundle_size", "reference_credit", "reference_mix_weight", "reference_natural_baseline"}),
        ),
        "grpo": Estimator(
            "(reward - group mean) / group std; pair with loss.kind = ppo (arXiv 2402.03300)",
            pointwise(grpo),
            least_group_size=2,
        ),
        "dapo": Estimator(
            "grpo's advantage; pair with loss.kind = ppo, loss.clip_high = 0.28, loss.aggregation = token_mean, "
            "rollout.dynamic_sampling, rewards.overlong_buffer_tokens (arXiv 2503.14476)",
            pointwise(grpo),
            least_group_size=2,
        ),
        "dr_grpo": Estimator(
            "reward - group mean; pair with loss.kind = ppo, loss.aggregation = sequence_mean_token_sum_norm "
            "(arXiv 2503.20783)",
            pointwise(dr_grpo),
            least_group_size=2,
        ),
        "rloo": Estimator(
            "reward - mean of the group's other rewards; pair with loss.kind = reinforce (arXiv 2402.14740)",
            pointwise(rloo),
            least_group_size=2,
        ),
        "reinforce_pp": Estimator(
            "(reward - group mean) / std of that over the batch; pair with loss.kind = ppo (arXiv 2501.03262)",
            pointwise(reinforce_pp),
            least_group_size=2,
        ),
        "gpg": Estimator(
            "(reward - group mean) * groups / groups of unequal rewards; pair with loss.kind = reinforce "
            "(arXiv 2504.02546)",
            pointwise(gpg),
            least_group_size=2,
        ),
        "opo": Estimator(
            "reward - sum(length * reward) / sum(length) of the group; pair with loss.kind = reinforce, one mini-batch "
            "a step (arXiv 2505.23585)",
            pointwise(opo),
            least_group_size=2,
            needs_lengths=True,
        ),
        "qae": Estimator(
            "(reward - quantile_level quantile of the group) / group std; pair as dapo (arXiv 2509.22611)",
            pointwise(qae),
            frozenset({"quantile_level"}),
            least_group_size=2,
            check=check_qae,
        ),
        "rs_grpo": Estimator(
            "(exp(b reward) / group mean of that - 1) / b, b = risk_temperature (arXiv 2509.24261)",
            pointwise(rs_grpo),
            frozenset({"risk_temperature"}),
            least_group_size=2,
        ),
        "pkpo": Estimator(
            "what a response adds to the best reward of k tries, any rewards (arXiv 2505.15201)",
            pointwise(pkpo),
            frozenset({"k", "pkpo_leave_one_out"}),
            least_group_size=2,
            check=check_pkpo,
        ),
        "passk": Estimator(
            "standardised largest reward of the groups of k that a response is in (arXiv 2508.10751)",
            pointwise(passk),
            frozenset({"k"}),
            least_group_size=2,
            check=check_k,
        ),
    }
)
