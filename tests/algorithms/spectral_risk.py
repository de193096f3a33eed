"""The risk measure itself, from a spectrum and a distribution: the package needs its gradient only."""

import torch

from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.spectra import Spectrum, quantile_integral

_QUADRATURE_POINTS = 2**14


def spectral_risk(scores: Distribution, spectrum: Spectrum) -> float:
    """J of the one row: exact for steps, else by the midpoint rule with 16,384 points."""
    if spectrum.steps is not None:
        return sum(height * quantile_integral(scores, 0.0, level) for level, height in spectrum.steps)
    levels = (torch.arange(_QUADRATURE_POINTS, dtype=torch.float64) + 0.5) / _QUADRATURE_POINTS
    index = torch.searchsorted(scores.cdf[0].contiguous(), levels).clamp(max=scores.atoms.size(1) - 1)
    return float((spectrum.density(levels) * scores.atoms[0][index]).mean())
