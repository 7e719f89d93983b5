"""How many frames to remember: the bound of the paper, the windows that follow from it, and a simulation.

Source: "Test-Time Training on Video Streams" (Wang et al., 2023), section 6.2 and appendix C.

A step trains on the mean gradient of the last k frames, the window. A larger k averages more noise away (less
variance), but also uses older frames, which are less like the current one (more bias). Suppose that

- the loss of the main task is alpha-strongly convex in the weights,
- its gradient changes by at most beta * eta from one frame to the next,
- the gradient of the self-supervised loss is that of the main task plus noise of variance sigma^2.

Then the paper's bound on the loss above the least possible one holds:

    excess loss  <=  1 / (2 alpha) * (k^2 beta^2 eta^2 + sigma^2 / k)                          `excess_loss_bound`

There are three candidates for the best window, with r = sigma^2 / (beta eta)^2:

- (r / 2)^(1/3) minimises the bound: there its derivative, 2 k beta^2 eta^2 - sigma^2 / k^2, is zero  `bound_minimiser`
- r^(1/3) is what the paper states: the same without the factor 2 of the derivative                   `sweet_spot`
- the root of k^2 (k - 1) = 2 r, about (2 r)^(1/3) + 1/3, minimises a tighter bound                   `drift_minimiser`

The tighter bound, `drift_excess_loss`, follows from the paper's proof. Frame t - j is j steps old, so the mean over the
window has a bias of at most beta * eta * (k - 1) / 2; the paper rounds this up to beta * eta * k. A quadratic loss on a
stream that moves at constant speed has exactly this loss, as `simulate` shows. The paper's window lies between the two
others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ttt_adapt.errors import ConfigError


def excess_loss_bound(k: float, alpha: float, beta: float, eta: float, sigma: float) -> float:
    """The paper's bound on the expected excess loss (theorem 1): (k^2 beta^2 eta^2 + sigma^2 / k) / (2 alpha).

    Args:
        k: size of the window in frames, at least 1.
        alpha: strong convexity of the main task's loss in the weights, > 0.
        beta: how much its gradient changes per unit of distance between frames, at most, >= 0.
        eta: largest distance between neighbouring frames, >= 0.
        sigma: standard deviation of the self-supervised gradient around the main task's, >= 0.

    Raises:
        ConfigError: a value out of range.
    """
    check_from(k=(k, 1.0), beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    return ((k * beta * eta) ** 2 + sigma**2 / k) / (2 * alpha)


def drift_excess_loss(k: float, alpha: float, beta: float, eta: float, sigma: float) -> float:
    """The tighter bound on the expected excess loss: ((k - 1)^2 / 4 beta^2 eta^2 + sigma^2 / k) / (2 alpha).

    The mean of the last k gradients has a bias of at most beta eta (0 + 1 + ... + (k - 1)) / k = beta eta (k - 1) / 2.
    A quadratic loss on a stream that moves in one direction by eta per frame has exactly this excess loss. Arguments
    and errors are those of `excess_loss_bound`.
    """
    check_from(k=(k, 1.0), beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    return (((k - 1) / 2 * beta * eta) ** 2 + sigma**2 / k) / (2 * alpha)


def sweet_spot(beta: float, eta: float, sigma: float) -> float:
    """The best window in frames as the paper states it: (sigma^2 / (beta^2 eta^2))^(1/3).

    Raises:
        ConfigError: `beta` or `eta` is not positive (nothing changes, so that a larger window is always better), or
            `sigma` is negative.
    """
    return _ratio(beta, eta, sigma) ** (1 / 3)


def bound_minimiser(beta: float, eta: float, sigma: float) -> float:
    """The real k that minimises `excess_loss_bound`: (sigma^2 / (2 beta^2 eta^2))^(1/3). Errors as in `sweet_spot`."""
    return (_ratio(beta, eta, sigma) / 2) ** (1 / 3)


def drift_minimiser(beta: float, eta: float, sigma: float) -> float:
    """The k >= 1 that minimises `drift_excess_loss`: the real root of k^2 (k - 1) = 2 r. Errors as in `sweet_spot`.

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
    """Measure the excess loss of several windows on a simulated stream for which the bound holds.

    A frame x_t is a point. The loss of the main task at frame t is alpha / 2 * |w - beta / alpha x_t|^2, with the
    gradient alpha w - beta x_t: it is alpha-strongly convex in the weights w, and the gradient changes by beta * |step|
    from one frame to the next. The self-supervised gradient adds noise of variance sigma^2. Training on the mean
    gradient of the last k frames converges to w = mean(beta x + noise) / alpha. Its loss at frame t is measured.

    Args:
        windows: the k to measure.
        alpha: strong convexity, > 0.
        beta: how much the gradient changes per unit of distance between frames, >= 0.
        eta: length of every step of the stream, >= 0.
        sigma: standard deviation of the length of the noise, >= 0.
        frames: number of frames at which the loss is measured, the same frames for every window.
        dimensions: of frames and weights.
        straight: True: all steps have one direction, the worst case of the bound. False: each has a random direction.
        seed: of steps and noise.

    Returns:
        The mean excess loss of each window, and the noisy targets beta x_t + noise, float64 [n, dimensions]. The
        targets are all that training sees of the stream.

    Raises:
        ConfigError: a value out of range.
    """
    check_from(windows=(min(windows, default=0), 1), frames=(frames, 1), dimensions=(dimensions, 1))
    check_from(beta=(beta, 0.0), eta=(eta, 0.0), sigma=(sigma, 0.0))
    check_positive(alpha=alpha)
    random = np.random.default_rng(seed)
    longest = max(windows)
    steps = random.normal(size=(frames + longest - 1, dimensions))  # [n, dimensions]
    steps = np.broadcast_to(steps[:1], steps.shape) if straight else steps
    steps = eta * steps / np.linalg.norm(steps, axis=1, keepdims=True)
    x = np.cumsum(steps, axis=0)  # [n, dimensions]
    targets = beta * x + random.normal(size=x.shape) * sigma / math.sqrt(dimensions)
    sums = np.concatenate([np.zeros((1, dimensions)), np.cumsum(targets, axis=0)])
    ends = np.arange(longest, len(x) + 1)  # [frames], one behind the last frame of each window
    losses = []
    for k in windows:
        weights = (sums[ends] - sums[ends - k]) / k / alpha  # [frames, dimensions]
        error = weights - beta / alpha * x[ends - 1]
        losses.append(float(alpha / 2 * (error**2).sum(axis=1).mean()))
    return losses, targets


def _ratio(beta: float, eta: float, sigma: float) -> float:
    """r = sigma^2 / (beta eta)^2."""
    check_from(sigma=(sigma, 0.0))
    check_positive(beta=beta, eta=eta)
    return (sigma / (beta * eta)) ** 2


def check_from(**limits: tuple[float, float]) -> None:
    """Raise a ConfigError for a name=(value, smallest) with a value that is smaller or not finite."""
    for name, (value, low) in limits.items():
        if not value >= low or math.isinf(value):
            raise ConfigError(f"{name} is {value!r}; expected a finite number of at least {low:g}")


def check_positive(**values: float) -> None:
    """Raise a ConfigError for a name=value that is not above 0 or not finite."""
    for name, value in values.items():
        if not value > 0 or math.isinf(value):
            raise ConfigError(f"{name} is {value!r}; expected a finite number above 0")
