"""Spectral risk measures of a distribution of scores, and the weights their policy gradients give to a score.

All of them are J = integral_0^1 phi(u) F^-1(u) du with F^-1 the quantile function and phi >= 0 the spectrum
(Acerbi 2002, https://doi.org/10.1016/S0378-4266(02)00281-9). Their gradient is E[psi(S) grad log pi(S)] with

    psi(s) = - integral_s^max phi(F(t)) dt,

which stays right where F has atoms; verifiable rewards are all atoms. psi <= 0 with psi(max) = 0; any constant may be
added that does not depend on S. At u = F(t) on a jump of phi the value above the jump counts, as inf{x : F(x) >= u}
does for quantiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import LEVEL_ROUNDING, Distribution
from megatron_riskpo.algorithms.option_checks import check_name
from megatron_riskpo.errors import UsageError
from megatron_riskpo.plugins import load_function

Density = Callable[[Tensor], Tensor]
"""phi: levels 0 <= u < 1 of any shape, float64, to finite weights >= 0 of the same shape."""

Steps = tuple[tuple[float, float], ...]
"""(level, height) pairs of a piecewise constant spectrum: phi(u) = sum of height * 1{u < level}, 0 < level <= 1."""


@dataclass(frozen=True)
class Spectrum:
    """phi, and its steps where it is piecewise constant: psi then needs quantiles at the levels only."""

    density: Density
    steps: Steps | None = None

    @classmethod
    def of_steps(cls, *steps: tuple[float, float]) -> "Spectrum":
        """phi(u) = sum of height * 1{u < level}."""

        def density(levels: Tensor) -> Tensor:
            below = ((levels < level * (1 - LEVEL_ROUNDING)).to(levels.dtype) * height for level, height in steps)
            return sum(below, torch.zeros_like(levels))

        return cls(density, steps)


@dataclass(frozen=True)
class SpectrumEntry:
    """An entry of the registry."""

    description: str
    """One line, for the user."""
    make: Callable[[AlgorithmConfig], Spectrum]


def _max_at_k(config: AlgorithmConfig) -> Spectrum:
    return Spectrum(lambda levels: config.k * levels ** (config.k - 1))


SPECTRA: Mapping[str, SpectrumEntry] = MappingProxyType(
    {
        "mean": SpectrumEntry("phi = 1: the mean score", lambda c: Spectrum.of_steps((1.0, 1.0))),
        "cvar": SpectrumEntry(
            "phi = 1{u < alpha} / alpha: mean of the lower tail", lambda c: Spectrum.of_steps((c.alpha, 1 / c.alpha))
        ),
        "rvar": SpectrumEntry(
            "phi = 1{alpha <= u < beta} / (beta - alpha): mean between two quantiles",
            lambda c: Spectrum.of_steps((c.beta, 1 / (c.beta - c.alpha)), (c.alpha, -1 / (c.beta - c.alpha))),
        ),
        "mvar": SpectrumEntry(
            "phi = 1{u < beta} + omega 1{u < alpha}: Mixed Value-at-Risk (arXiv 2510.00911)",
            lambda c: Spectrum.of_steps((c.beta, 1.0), (c.alpha, c.omega)),
        ),
        "upper_tail": SpectrumEntry(
            "phi = 1{u >= beta} / (1 - beta): mean of the upper tail, seeks risk",
            lambda c: Spectrum.of_steps((1.0, 1 / (1 - c.beta)), (c.beta, -1 / (1 - c.beta))),
        ),
        "upper_mvar": SpectrumEntry(
            "phi = 1{u >= alpha} + omega 1{u >= beta}: the mirror image of mvar, seeks risk",
            lambda c: Spectrum.of_steps((1.0, 1 + c.omega), (c.alpha, -1.0), (c.beta, -c.omega)),
        ),
        "max_at_k": SpectrumEntry("phi = k u^(k-1): expected largest of k scores, seeks risk", _max_at_k),
    }
)


def spectrum_of(config: AlgorithmConfig) -> Spectrum:
    """The spectrum that the configuration names. Raises UsageError for unknown names, impossible levels, and functions
    of the user's that are no spectrum."""
    name = config.spectrum
    if ":" in name:
        return _user_spectrum(name, config)
    check_name("algorithm.spectrum", name, SPECTRA)
    if name == "upper_tail" and config.beta >= 1:
        raise UsageError("algorithm.spectrum = upper_tail has no tail above algorithm.beta = 1: lower beta")
    return SPECTRA[name].make(config)


def _user_spectrum(name: str, config: AlgorithmConfig) -> Spectrum:
    function = load_function("algorithm.spectrum", name)

    def density(levels: Tensor) -> Tensor:
        try:
            values = function(levels, config)
        # Whatever the user's function raises.
        except Exception as error:
            raise UsageError(f"algorithm.spectrum = {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(values, Tensor) or values.shape != levels.shape:
            raise UsageError(f"algorithm.spectrum = {name} must return a tensor of the shape of its levels")
        broken = levels[~(values.isfinite() & (values >= 0))]
        if broken.numel():
            raise UsageError(
                f"algorithm.spectrum = {name} must be finite and >= 0 for all levels 0 <= u < 1, which it is not at "
                f"u = {float(broken[0]):g}"
            )
        return values.to(torch.float64)

    density(torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1])
    return Spectrum(density)


def rule_weights(
    values: Float64[Tensor, "num_rows num_values"], scores: Distribution, density: Density
) -> Float64[Tensor, "num_rows num_values"]:
    """psi of each value under the distribution of its row (or of the only row), for any spectrum.

    Exact: F is constant between atoms, so psi is linear there. Below the lowest atom its slope is phi(0).
    """
    if scores.num_rows == 1 and values.size(0) > 1:
        # One row of values as well: the pooled atoms are too many for a copy a group.
        return rule_weights(values.reshape(1, -1), scores, density).view(values.shape)
    atoms = scores.atoms
    # Above the last atom that has mass psi is 0, and phi need not be defined.
    below = scores.cdf < 1
    slopes = torch.zeros_like(scores.cdf).masked_scatter_(below, density(scores.cdf[below]))
    gaps = atoms.diff(dim=1, append=atoms[:, -1:])
    at_atoms = -(slopes * gaps).flip(1).cumsum(1).flip(1)
    first_slope = density(torch.zeros(1, dtype=torch.float64))
    slopes = torch.cat([first_slope.expand(len(slopes), 1), slopes], dim=1)
    starts = torch.cat([atoms[:, :1], atoms], dim=1)
    at_starts = torch.cat([at_atoms[:, :1], at_atoms], dim=1)
    interval = torch.searchsorted(atoms.contiguous(), values.contiguous(), right=True)
    return at_starts.gather(1, interval) + slopes.gather(1, interval) * (values - starts.gather(1, interval))


def step_weights(
    values: Float64[Tensor, "num_rows num_values"],
    steps: Steps,
    quantiles: Sequence[Float64[Tensor, "..."] | float],
) -> Float64[Tensor, "num_rows num_values"]:
    """psi in closed form for a piecewise constant spectrum: - sum of height * (q_level - s)^+.

    quantiles: q of each step's level, a number or one a row; that of level 1 is the largest score. For mvar this is
    theorem 1 of arXiv 2510.00911: -(q_beta - S)^+ - omega (q_alpha - S)^+, slopes 1 + omega | 1 | 0.
    """
    total = torch.zeros_like(values)
    for (_, height), quantile in zip(steps, quantiles, strict=True):
        quantile = torch.as_tensor(quantile, dtype=torch.float64).reshape(-1, 1)
        total = total - height * (quantile - values).clamp(min=0)
    return total


def quantile_integral(scores: Distribution, low: float, high: float) -> float:
    """integral_low^high F^-1(u) du of the one row, 0 <= low <= high <= 1; exact, ties included."""
    edges = torch.nn.functional.pad(scores.cdf[0], (1, 0)).clamp(low, high)
    return float((scores.atoms[0] * edges.diff()).sum())


def rvar(scores: Distribution, low: float, high: float) -> float:
    """Range Value-at-Risk: mean of the quantile function between the levels low < high."""
    return quantile_integral(scores, low, high) / (high - low)


def cvar(scores: Distribution, level: float) -> float:
    """Conditional Value-at-Risk of the lower tail: mean of the quantile function below `level` > 0."""
    return rvar(scores, 0.0, level)


def mvar(scores: Distribution, alpha: float, beta: float, omega: float) -> float:
    """Mixed Value-at-Risk: (1 + omega) times the integral of F^-1 below alpha, plus the one from alpha to beta.

    Not normalised, as in the paper: its weights integrate to beta + omega * alpha.
    """
    return (1 + omega) * quantile_integral(scores, 0.0, alpha) + quantile_integral(scores, alpha, beta)
