"""All advantage estimators by the name that `algorithm.estimator` takes. A new one is a file and a line here."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_riskpo.algorithms.advantages.contract import Estimator
from megatron_riskpo.algorithms.advantages.grpo import check_grpo, grpo
from megatron_riskpo.algorithms.advantages.riskpo import check_riskpo, riskpo

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "riskpo": Estimator("Mixed Value-at-Risk of bundle scores (arXiv 2510.00911)", riskpo, check_riskpo),
        "grpo": Estimator("reward normalised within the question's group (arXiv 2402.03300)", grpo, check_grpo),
    }
)
