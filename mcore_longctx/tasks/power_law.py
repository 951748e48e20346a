"""Loss against the amount of context as a falling power law, L(c) = (a / c)^b + g (2309.16039, Fig. 1): its fit to a few bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PowerLaw", "fit_power_law"]

Array = npt.NDArray[np.float64]

MIN_POINTS = 5  # three parameters and two points to disagree with them
MIN_SPAN = 8.0  # largest / smallest context: three octaves
HUBER = 0.05  # nats per token: a point further off counts by its distance, not by the square of it
EXPONENTS = (0.02, 3.0)  # of b; 2309.16039 finds about 0.5


@dataclass(frozen=True)
class PowerLaw:
    """A fitted L(c) = (a / c)^b + g.

    Attributes:
        a: tokens of context at which the part that context can lower is 1 nat.
        b: how fast it falls.
        g: nats per token that no context removes, at least 0.
        residual: root of the mean square of what the points lie off, nats per token.
        worst: the point that lies furthest off: its distance, nats per token.
        points: number of points.
        is_determined: whether b lies inside its bounds and g above 0; otherwise the line follows the points and its parameters
            mean nothing.
    """

    a: float
    b: float
    g: float
    residual: float
    worst: float
    points: int
    is_determined: bool

    def __call__(self, context: float) -> float:
        """Loss after `context` tokens, nats per token."""
        return float((self.a / context) ** self.b + self.g)


def fit_power_law(contexts: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Fit by least squares with Huber's weights (linear beyond 0.05 nats), b within 0.02 to 3, a > 0, g >= 0.

    For a given b the law is linear in a^b and g, so only b is searched: a grid over its bounds, refined around its best point.

    Returns:
        the law; None for fewer than 5 points, a span of contexts below 8 times, or losses that do not fall.

    Raises:
        ValueError: a context that is not positive, a number that is not finite, or lists of unequal length.
    """
    c, loss = np.asarray(contexts, np.float64), np.asarray(losses, np.float64)
    if c.shape != loss.shape or not np.isfinite(c).all() or not np.isfinite(loss).all() or (c <= 0).any():
        raise ValueError("contexts must be positive, and there must be one finite loss for each")
    if len(c) < MIN_POINTS or c.max() < MIN_SPAN * c.min():
        return None
    grid = np.geomspace(*EXPONENTS, 200)
    for _ in range(5):  # each round narrows b a hundredfold
        scale, floor, costs = _best_lines(grid, c, loss)
        best = int(np.argmin(costs))
        b, height, g = float(grid[best]), float(scale[best]), float(floor[best])
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 200)
    if height <= 0:
        return None
    origin = float(c.min())  # height is the law's part at the smallest context: in a^b itself large b would overflow
    a = origin * height ** (1 / b)
    off = height * (c / origin) ** -b + g - loss
    inside = EXPONENTS[0] * 1.001 < b < EXPONENTS[1] * 0.999 and g > 0
    return PowerLaw(a, b, g, float(np.sqrt(np.mean(off**2))), float(np.abs(off).max()), len(c), inside)


def _best_lines(exponents: Array, c: Array, loss: Array) -> tuple[Array, Array, Array]:
    """For each b, the height >= 0 and g >= 0 of the best `height (c / min c)^-b + g`, and its cost; all [len(exponents)]."""
    x = (c / c.min())[None, :] ** -exponents[:, None]  # [exponents, points]
    weights = np.ones_like(x)
    for _ in range(60):  # Huber's estimate as repeated weighted least squares: converges linearly, to 1e-12 long before
        height, g = _weighted_line(x, loss, weights)
        off = np.abs(height[:, None] * x + g[:, None] - loss)
        weights = np.minimum(1.0, HUBER / np.maximum(off, HUBER))
    cost = np.where(off <= HUBER, off**2 / 2, HUBER * (off - HUBER / 2)).sum(axis=1)
    return height, g, cost


def _weighted_line(x: Array, loss: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares of loss on (x, 1) with both coefficients at least 0, row by row."""
    total = weights.sum(axis=1)
    mean_x, mean_y = (weights * x).sum(axis=1) / total, (weights * loss).sum(axis=1) / total
    dx = x - mean_x[:, None]
    height = (weights * dx * (loss - mean_y[:, None])).sum(axis=1) / (weights * dx**2).sum(axis=1)
    g = mean_y - height * mean_x
    through_zero = (weights * x * loss).sum(axis=1) / (weights * x**2).sum(axis=1)  # the best line where g would be below 0
    height, g = np.where(g < 0, through_zero, height), np.maximum(g, 0.0)
    return np.where(height < 0, 0.0, height), np.where(height < 0, mean_y, g)
