import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.tasks.power_law import HUBER, fit_power_law

BINS = [2 ** (i + 0.5) for i in range(4, 22)]  # middles of the bins of 4M tokens


def law(c, a, b, g):
    return (a / c) ** b + g


@settings(max_examples=25)
@given(st.floats(1, 500), st.floats(0.1, 1.5), st.floats(0.1, 4))
def test_a_law_is_found_again(a, b, g):
    found = fit_power_law(BINS, [law(c, a, b, g) for c in BINS])
    assert found.residual < 1e-6
    for c in BINS:
        assert found(c) == pytest.approx(law(c, a, b, g), abs=1e-5)
    assert (found.a, found.b, found.g) == pytest.approx((a, b, g), rel=1e-3, abs=1e-3)
    assert found.is_determined
    assert found.points == len(BINS)


def huber(parameters, points):
    total = 0.0
    for c, loss in points:
        off = abs(law(c, *parameters) - loss)
        total += off * off / 2 if off <= HUBER else HUBER * (off - HUBER / 2)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_no_other_law_lies_nearer_to_the_points(seed):
    draw = random.Random(seed)
    points = [(c, law(c, 25.4, 0.45, 1.56) + draw.gauss(0, 0.03)) for c in BINS]
    for i in draw.sample(range(len(points)), 2):
        points[i] = (points[i][0], points[i][1] + draw.choice((-1, 1)) * 0.5)  # far off
    found = fit_power_law(*zip(*points, strict=True))
    least = huber((found.a, found.b, found.g), points)
    for _ in range(3000):
        size = 10 ** draw.uniform(-5, -0.3)
        b, g = found.b * math.exp(draw.gauss(0, size)), max(0.0, found.g + draw.gauss(0, size))
        a = found.a * math.exp(draw.gauss(0, 3 * size))
        if 0.02 <= b <= 3:
            assert huber((a, b, g), points) >= least * (1 - 1e-6)
    off = [abs(found(c) - loss) for c, loss in points]
    assert found.worst == pytest.approx(max(off))
    assert found.residual == pytest.approx(math.sqrt(sum(x * x for x in off) / len(off)))


def test_one_point_far_off_hardly_moves_the_law():
    losses = [law(c, 25.4, 0.45, 1.56) for c in BINS]
    losses[10] += 5
    found = fit_power_law(BINS, losses)
    assert (found.b, found.g) == pytest.approx((0.45, 1.56), abs=0.05)
    assert found.worst == pytest.approx(5, abs=0.05)


def test_what_no_context_removes_is_never_below_zero():
    found = fit_power_law(BINS, [law(c, 25.4, 0.45, -0.05) + 0.001 for c in BINS])
    assert found.g == 0
    assert not found.is_determined


def test_a_law_that_its_points_do_not_determine_says_so():
    assert not fit_power_law(
        BINS, [3 - 0.1 * math.log(c) for c in BINS]
    ).is_determined  # a straight line on a log axis: b at its bound


@pytest.mark.parametrize(
    ("contexts", "losses"),
    [
        (BINS[:4], [4, 3, 2.5, 2.2]),
        ([16, 20, 30, 40, 60, 90, 120], [4, 3.5, 3, 2.8, 2.6, 2.5, 2.4]),  # all within three octaves
        (BINS, [2.0] * len(BINS)),
        (BINS, [1 + 0.1 * i for i in range(len(BINS))]),  # gets worse with context
    ],
)
def test_too_few_points_and_losses_that_do_not_fall_give_no_law(contexts, losses):
    assert fit_power_law(contexts, losses) is None


@pytest.mark.parametrize(
    ("contexts", "losses"), [(BINS, [2.0]), ([0, *BINS], [2.0] * 19), (BINS, [math.nan] * len(BINS)), ([math.inf], [1.0])]
)
def test_what_is_no_curve_is_refused(contexts, losses):
    with pytest.raises(ValueError, match="positive"):
        fit_power_law(contexts, losses)
