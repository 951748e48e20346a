import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.tasks.statistics import exact_mcnemar, mean_interval, paired_mean_interval, student_t_quantile, wilson_interval

# Wilson 95 %: 5/5 .. 500/500 as printed in the literature's tables to two or three digits; 0/180 and 168/180 worked by hand
WILSON = {
    (5, 5): (0.5655, 1.0),
    (10, 10): (0.7225, 1.0),
    (45, 50): (0.7864, 0.9565),
    (0, 180): (0.0, 0.0209),
    (168, 180): (0.8871, 0.9614),
}
# two-sided 95 % and 99 % points of Student's t from printed tables
STUDENT_T = {
    (0.975, 1): 12.706,
    (0.975, 2): 4.303,
    (0.975, 5): 2.571,
    (0.975, 11): 2.201,
    (0.975, 30): 2.042,
    (0.975, 95): 1.985,
    (0.995, 4): 4.604,
    (0.995, 7): 3.499,
}


@pytest.mark.parametrize(("counts", "interval"), WILSON.items())
def test_wilson_interval_gives_the_known_ends(counts, interval):
    assert wilson_interval(*counts) == pytest.approx(interval, abs=6e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation_and_holds_the_rate(counts):
    k, n = counts
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):  # |rate - p| = z sqrt(p (1 - p) / n) is the definition; 0 and 1 are its trivial ends
        if 0 < end < 1:
            assert abs(k / n - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / n), rel=1e-6)


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson_interval(6, 5)


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (0, 6, 2 / 64), (6, 0, 2 / 64), (0, 11, 2 / 2048), (3, 3, 1.0), (1, 5, 14 / 64)]
)
def test_exact_mcnemar_gives_the_binomial_tail(lost, won, p):
    assert exact_mcnemar(lost, won) == pytest.approx(p)


@pytest.mark.parametrize(("point", "t"), STUDENT_T.items())
def test_student_quantiles_agree_with_printed_tables(point, t):
    assert student_t_quantile(*point) == pytest.approx(t, abs=6e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert student_t_quantile(0.975, 100_000) == pytest.approx(1.95998, abs=1e-4)


def test_mean_interval_of_a_worked_example():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])  # s = 1.291, t(3) = 3.1824, sqrt(4) = 2
    assert (found.mean, found.count) == (2.5, 4)
    assert found.half_width == pytest.approx(3.1824 * 1.2910 / 2, abs=1e-3)
    assert (found.low, found.high) == (2.5 - found.half_width, 2.5 + found.half_width)


def test_paired_difference_is_far_narrower_than_its_sides():
    before = [1.0, 2.0, 3.0, 4.0]
    after = [x + 0.1 for x in before]
    assert paired_mean_interval(before, after).mean == pytest.approx(0.1)
    assert paired_mean_interval(before, after).half_width < 1e-9 < mean_interval(before).half_width
    with pytest.raises(ValueError, match="shorter"):
        paired_mean_interval(before, after[:3])


def test_one_unit_has_no_interval():
    assert mean_interval([2.0]).half_width == math.inf
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
