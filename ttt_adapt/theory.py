"""How many frames to remember: the bound of the paper, its sweet spot, and a window that finds it on the stream.

"Test-Time Training on Video Streams" (Wang et al., 2023), section 6.2 and appendix C. Training on the mean gradient of
the last k frames averages noise away (variance) and mixes in frames that no longer matter (bias). For a main task loss
that is alpha-strongly convex in the weights and whose gradient moves by at most beta * eta from one frame to the next,
and a self-supervised gradient that differs from the main task's by noise of variance sigma^2,

    excess loss  <=  1 / (2 alpha) * (k^2 beta^2 eta^2 + sigma^2 / k)                          `excess_loss_bound`

Three windows follow from it, with r = sigma^2 / (beta eta)^2:

- (r / 2)^(1/3), where the derivative 2 k beta^2 eta^2 - sigma^2 / k^2 is zero                 `bound_minimiser`
- r^(1/3), which the paper states: the same law without the factor 2 of the derivative         `sweet_spot`
- the root of k^2 (k - 1) = 2 r, about (2 r)^(1/3) + 1/3                                       `drift_minimiser`

The last one comes from the proof: frame t - j lies j steps back, so the bias is at most beta * eta * (k - 1) / 2, where
the paper rounds up to beta * eta * k. That gives a tighter bound, `drift_excess_loss`, which a quadratic loss on a
steadily drifting stream meets with equality (`simulate`). The paper's constant lies between the two others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ttt_adapt.errors import ConfigError


def excess_loss_bound(k: float, alpha: float, beta: float, eta: float, sigma: float) -> float:
    """The paper's bound on the expected excess loss (theorem 1): (k^2 beta^2 eta^2 + sigma^2 / k) / (2 alpha).

    Args:
        k: window, frames, at least 1.
        alpha: strong convexity of the main task's loss in the weights, > 0.
        beta: smoothness of its gradient in the frame, >= 0.
        eta: largest distance between neighbouring frames, >= 0.
        sigma: standard deviation of the self-supervised gradient around the main task's, >= 0.

    Raises:
        ConfigError: a value out of range.
    """
    check_from(k=(k, 1.0), beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    return ((k * beta * eta) ** 2 + sigma**2 / k) / (2 * alpha)


def drift_excess_loss(k: float, alpha: float, beta: float, eta: float, sigma: float) -> float:
    """The bound before the proof rounds up: ((k - 1)^2 / 4 beta^2 eta^2 + sigma^2 / k) / (2 alpha).

    The mean of the last k gradients is off by at most beta eta (0 + 1 + ... + (k - 1)) / k = beta eta (k - 1) / 2.
    Quadratic losses on a stream that drifts straight on at eta a frame have exactly this excess. Arguments and errors
    as in `excess_loss_bound`.
    """
    check_from(k=(k, 1.0), beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    return (((k - 1) / 2 * beta * eta) ** 2 + sigma**2 / k) / (2 * alpha)


def sweet_spot(beta: float, eta: float, sigma: float) -> float:
    """The window that the paper states, (sigma^2 / (beta^2 eta^2))^(1/3); see the module for its constant.

    Raises:
        ConfigError: `beta` or `eta` is not positive (nothing moves: any window is too small), or `sigma` is negative.
    """
    return _ratio(beta, eta, sigma) ** (1 / 3)


def bound_minimiser(beta: float, eta: float, sigma: float) -> float:
    """Where `excess_loss_bound` is least over real k: (sigma^2 / (2 beta^2 eta^2))^(1/3). Errors as in `sweet_spot`."""
    return (_ratio(beta, eta, sigma) / 2) ** (1 / 3)


def drift_minimiser(beta: float, eta: float, sigma: float) -> float:
    """Where `drift_excess_loss` is least over k >= 1: the real root of k^2 (k - 1) = 2 r. Errors as in `sweet_spot`.

    By Cardano's formula: k = 1/3 + u + 1 / (9 u) with u = (1/27 + r + sqrt(r^2 + 2 r / 27))^(1/3).
    """
    r = _ratio(beta, eta, sigma)
    u = (1 / 27 + r + math.sqrt(r * r + 2 * r / 27)) ** (1 / 3)
    return 1 / 3 + u + 1 / (9 * u)


def simulate(
    windows: Sequence[int],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    eta: float = 0.05,
    sigma: float = 1.0,
    frames: int = 2000,
    dimensions: int = 8,
    straight: bool = True,
    seed: int = 0,
) -> tuple[list[float], np.ndarray]:
    """Test-time training on a strongly convex stream: the excess loss of every window, measured.

    Frames x_t are points, and the main task's loss at frame t is alpha / 2 * |w - beta / alpha x_t|^2, so its gradient
    alpha w - beta x_t is alpha-strongly convex in the weights and beta-smooth in the frame. The self-supervised
    gradient adds noise of variance sigma^2. Training on the mean of the last k converges to w = mean(beta x + noise) /
    alpha, which is scored on frame t.

    Args:
        windows: the k to measure.
        alpha: strong convexity.
        beta: smoothness.
        eta: length of every step of the stream.
        sigma: standard deviation of the noise's length.
        frames: frames that are scored, for each window the same.
        dimensions: of frames and weights.
        straight: all steps in one direction, the worst case of the bound; else each in a direction of its own.
        seed: of steps and noise.

    Returns:
        The mean excess loss of each window, and the noisy targets beta x_t + noise, float64 [n, dimensions]: what a
        stream shows of itself.

    Raises:
        ConfigError: a value out of range.
    """
    check_from(windows=(min(windows, default=0), 1), frames=(frames, 1), dimensions=(dimensions, 1))
    check_from(beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    random = np.random.default_rng(seed)
    longest = max(windows)
    steps = random.normal(size=(frames + longest - 1, dimensions))
    steps = np.broadcast_to(steps[:1], steps.shape) if straight else steps
    steps = eta * steps / np.linalg.norm(steps, axis=1, keepdims=True)
    x = np.cumsum(steps, axis=0)
    targets = beta * x + random.normal(size=x.shape) * sigma / math.sqrt(dimensions)
    sums = np.concatenate([np.zeros((1, dimensions)), np.cumsum(targets, axis=0)])
    ends = np.arange(longest, len(x) + 1)
    losses = []
    for k in windows:
        weights = (sums[ends] - sums[ends - k]) / k / alpha
        off = weights - beta / alpha * x[ends - 1]
        losses.append(float(alpha / 2 * (off**2).sum(axis=1).mean()))
    return losses, targets


def _ratio(beta: float, eta: float, sigma: float) -> float:
    """sigma^2 / (beta eta)^2."""
    check_from(sigma=(sigma, 0.0))
    check_positive(beta=beta, eta=eta)
    return (sigma / (beta * eta)) ** 2


def check_from(**limits: tuple[float, float]) -> None:
    """Raises ConfigError for a (value, smallest) whose value is below or not finite."""
    for name, (value, low) in limits.items():
        if not value >= low or math.isinf(value):
            raise ConfigError(f"{name} is {value!r}; expected a finite number of at least {low:g}")


def check_positive(**values: float) -> None:
    """Raises ConfigError for a value that is not above 0 or not finite."""
    for name, value in values.items():
        if not value > 0 or math.isinf(value):
            raise ConfigError(f"{name} is {value!r}; expected a finite number above 0")
