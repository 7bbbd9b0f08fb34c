"""Differences between architectures with simultaneous intervals: the statistics of evals.compare."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from scripts.cli import UserError

LEVEL = 0.95
DRAWS = 400_000  # of the largest |t|: its 95 % point is then known to about 0.3 %
RESAMPLES = 2_000
MOST_SEEDS = 1_000

Runs = dict[tuple[str, int], float]  # {(architecture, seed): held-out loss}


@dataclass(frozen=True)
class Fit:
    """Least squares of loss = architecture + seed, the architectures relative to the control.

    Args:
        names: architectures but the control, A - 1 of them.
        weights: `[A - 1, runs]`; times the runs' losses, these are the differences.
        differences: from the control, `[A - 1]`.
        covariance: of the differences in units of the residual variance, `[A - 1, A - 1]`.
        deviation: residual standard deviation.
        freedom: its degrees of freedom.
        anova: {factor: (sum of squares, degrees of freedom, F, p)}.
    """

    names: list[str]
    weights: np.ndarray
    differences: np.ndarray
    covariance: np.ndarray
    deviation: float
    freedom: int
    anova: dict[str, tuple[float, int, float, float]]

    @property
    def errors(self) -> np.ndarray:
        """Standard errors of the differences, `[A - 1]`."""
        return self.deviation * np.sqrt(np.diag(self.covariance))


def fit(runs: Runs, control: str) -> Fit:
    """Fit the additive model; combinations of architecture and seed may be missing.

    Raises:
        UserError: when the runs do not determine the differences and an error.
    """
    names = [name for name in dict.fromkeys(name for name, _ in runs) if name != control]
    seeds = sorted({seed for _, seed in runs})
    if not names or not any(name == control for name, _ in runs):
        raise UserError(
            f"{control} and others are to be compared, the runs are of {', '.join({run for run, _ in runs})}"
        )
    losses = np.array(list(runs.values()))
    is_name = np.array([[run == name for name in names] for run, _ in runs], dtype=float).reshape(len(runs), -1)
    is_seed = np.array([[run == seed for seed in seeds] for _, run in runs], dtype=float)
    design = np.hstack([is_name, is_seed])
    freedom = len(losses) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(
            f"{len(runs)} runs of {len(names) + 1} architectures give no error: train every one with 2 seeds"
        )

    def squares(columns: np.ndarray) -> float:
        return float(np.sum((losses - columns @ (np.linalg.pinv(columns) @ losses)) ** 2))

    inverse = np.linalg.pinv(design)
    residual = squares(design)
    variance = residual / freedom
    ones = np.ones((len(losses), 1))
    anova = {}
    factors = {
        "architecture": (is_seed, len(names)),
        "seed": (np.hstack([ones, is_name]), len(seeds) - 1),
    }
    for factor, (without, degrees) in factors.items():
        added = squares(without) - residual
        ratio = added / degrees / variance if degrees and variance else math.nan
        anova[factor] = (added, degrees, ratio, float(stats.f.sf(ratio, degrees, freedom)))
    anova["error"] = (residual, freedom, math.nan, math.nan)
    weights = inverse[: len(names)]
    return Fit(names, weights, weights @ losses, weights @ weights.T, math.sqrt(variance), freedom, anova)


def largest_t(covariance: np.ndarray, freedom: int, draws: int = DRAWS) -> np.ndarray:
    """Draws of the largest |t| of differences with this covariance (in any units), sorted `[draws]`."""
    generator = np.random.default_rng(0)
    scale = np.sqrt(np.diag(covariance))
    root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    normal = generator.standard_normal((draws, len(scale))) @ root.T
    chi = np.sqrt(generator.chisquare(freedom, draws) / freedom)
    return np.sort(np.abs(normal).max(axis=1) / chi)


def critical_value(largest: np.ndarray) -> float:
    """c of the simultaneous intervals, from `largest_t`."""
    return float(np.quantile(largest, LEVEL))


def adjusted_p(t: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """How often the largest |t| is at least |t|, `[A - 1]`."""
    return 1 - np.searchsorted(largest, np.abs(t)) / len(largest)


def half_width(architectures: int, seeds: int, deviation: float) -> float:
    """Of the interval of every difference, when all architectures have all seeds."""
    others = architectures - 1
    covariance = (np.eye(others) + 1) / seeds
    return critical_value(largest_t(covariance, others * (seeds - 1))) * deviation * math.sqrt(2 / seeds)


def seeds_needed(architectures: int, deviation: float, target: float) -> int | None:
    """The smallest number of seeds whose half-width is at most `target`; None for more than `MOST_SEEDS`."""
    low, high = 1, 2
    while half_width(architectures, high, deviation) > target:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if half_width(architectures, middle, deviation) > target else (low, middle)
    return high


def resampled(nats: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Differences on documents drawn with replacement, `[RESAMPLES, A - 1]`.

    Args:
        nats: summed loss of each document, `[runs, documents]`.
        tokens: of each document, `[documents]`.
        weights: of `Fit`.
    """
    count = len(tokens)
    times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return (times @ nats.T) / (times @ tokens)[:, None] @ weights.T
