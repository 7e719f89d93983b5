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

from ttt_adapt.theory.bound import (
    bound_minimiser,
    drift_excess_loss,
    drift_minimiser,
    excess_loss_bound,
    simulate,
    sweet_spot,
)
from ttt_adapt.theory.window import AutoWindow, gradient_sketch

__all__ = [
    "AutoWindow",
    "bound_minimiser",
    "drift_excess_loss",
    "drift_minimiser",
    "excess_loss_bound",
    "gradient_sketch",
    "simulate",
    "sweet_spot",
]
