import math
from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.tasks.statistics import (
    EffectiveLength,
    ScoreInterval,
    effective_length,
    exact_mcnemar,
    macro_average,
    mean_interval,
    paired_mean_interval,
    paired_sign_test,
    score_interval,
    student_t_quantile,
    wilson_interval,
)

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


def test_a_loss_that_is_no_number_is_not_averaged_away():
    found = mean_interval([2.0, math.nan, 3.0])
    assert math.isnan(found.mean)
    assert (found.half_width, found.count) == (math.inf, 3)


def test_one_unit_has_no_interval():
    assert mean_interval([2.0]).half_width == math.inf
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


quarters = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_scores_of_right_and_wrong_have_wilsons_interval(counts):
    right, every = counts
    found = score_interval([1.0] * right + [0.0] * (every - right))
    assert (found.low, found.high) == pytest.approx(wilson_interval(right, every), abs=1e-12)
    assert found.count == every


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_an_interval_of_scores_holds_their_mean_and_is_never_wider_than_that_of_right_and_wrong(scores):
    found = score_interval(scores)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(sum(map(Fraction, scores)) / len(scores), abs=1e-12)
    low, high = solve_wilson(found.mean, len(scores))
    assert low - 1e-9 <= found.low
    assert found.high <= high + 1e-9


def solve_wilson(rate, trials):
    """The ends by bisection of (rate - p)^2 = z^2 p (1 - p) / trials, which is how they are defined."""

    def outside(p):
        return (rate - p) ** 2 > 1.959963984540054**2 * p * (1 - p) / trials

    ends = []
    for far in (0.0, 1.0):
        a, b = far, rate  # outside, inside
        if not outside(a):
            b = a
        for _ in range(200):
            a, b = ((a + b) / 2, b) if outside((a + b) / 2) else (a, (a + b) / 2)
        ends.append(b)
    return ends


@given(quarters, st.integers(1, 40))
def test_equal_scores_are_not_exact(score, count):
    found = score_interval([score] * count)
    assert found.high - found.low > 0.5 / count**0.75  # Wilson's own width at n/n is 3.84 / (n + 3.84)
    assert found.certainty == pytest.approx(1 - (found.high - found.low))


def test_many_scores_have_the_normal_interval_of_their_own_spread():
    found = score_interval([0.5, 1.0] * 400)  # standard deviation 0.25: 1.96 x 0.25 / sqrt(800) = 0.01732; right and wrong: 0.030
    assert (found.high - found.low) / 2 == pytest.approx(0.01732, rel=0.01)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.8, 0.95])
def test_the_interval_of_recalls_of_four_holds_the_truth_in_95_of_100_cases(chance):
    """Exact coverage: every set of 6 scores of 0, 1/4, ... 1 with its probability, when all four answers stand and fall as one in
    half of the samples and each for itself in the others."""
    alone = [math.comb(4, k) * chance**k * (1 - chance) ** (4 - k) for k in range(5)]
    together = [1 - chance, 0, 0, 0, chance]
    probability = [(a + b) / 2 for a, b in zip(alone, together, strict=True)]
    covered = total = 0.0
    for draw in combinations_with_replacement(range(5), 6):
        ways = math.factorial(6) / math.prod(math.factorial(n) for n in Counter(draw).values())
        weight = ways * math.prod(probability[k] for k in draw)
        found = score_interval([k / 4 for k in draw])
        total += weight
        covered += weight * (found.low <= chance <= found.high)
    assert total == pytest.approx(1)
    assert covered > 0.95


@pytest.mark.parametrize(
    ("chances", "samples"),
    [([0.85] * 13, 10), ([0.99] * 13, 25), (np.linspace(0.3, 1, 13).tolist(), 10), ([1.0] * 12 + [0.5], 25), ([0.9] * 5, 5)],
)
def test_the_interval_of_a_macro_average_holds_the_truth_in_95_of_100_cases(chances, samples):
    draws = np.random.default_rng(13)
    truth, repetitions, covered = float(np.mean(chances)), 400, 0
    for _ in range(repetitions):
        scores = {str(t): draws.binomial(1, chance, samples).astype(float).tolist() for t, chance in enumerate(chances)}
        found = macro_average(scores)
        covered += found.low <= truth <= found.high
    # Wilson's own coverage lies within 93 and 98 % here; 400 draws add a standard deviation of 1.1 %
    assert covered / repetitions > 0.93 - 2 * 0.011


def test_a_macro_average_weighs_tasks_and_not_samples():
    found = macro_average({"a": [1.0] * 30, "b": [0.0] * 10})
    assert (found.mean, found.count) == (0.5, 40)
    # 13 tasks x n at 85 %: +-4.1 points for 25, +-2.0 for 100, +-0.9 for 500 (normal interval, worked by hand: 1.96 sqrt(.1275 / 13 n))
    for samples, points in ((100, 1.94), (500, 0.868)):
        right = round(0.85 * samples)
        found = macro_average({str(t): [1.0] * right + [0.0] * (samples - right) for t in range(13)})
        assert found.mean == pytest.approx(0.85)
        assert 50 * (found.high - found.low) == pytest.approx(points, rel=0.01)


@given(st.dictionaries(st.text(max_size=3), st.lists(quarters, min_size=1, max_size=8), min_size=1, max_size=6))
def test_a_macro_average_holds_its_mean_and_does_not_depend_on_the_order(scores):
    found = macro_average(scores)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high
    backwards = macro_average({name: scores[name][::-1] for name in reversed(scores)})
    assert (found.mean, found.low, found.high) == pytest.approx((backwards.mean, backwards.low, backwards.high), abs=1e-12)


def test_all_right_everywhere_says_no_more_than_all_samples_together():
    found = macro_average({str(t): [1.0] * 5 for t in range(13)})
    assert (found.low, found.high) == pytest.approx(wilson_interval(65, 65))


@pytest.mark.parametrize("scores", [{}, {"a": []}, {"a": [0.5, 1.5]}, {"a": [math.nan]}])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(ValueError, match="score"):
        macro_average(scores)


def test_effective_length_is_the_longest_above_the_threshold():
    averages = {
        4096: ScoreInterval(0.95, 0.9, 0.98, 325),
        8192: ScoreInterval(0.87, 0.84, 0.9, 325),
        16384: ScoreInterval(0.856, 0.8, 0.9, 325),  # not above
    }
    assert effective_length(averages) == EffectiveLength(8192, 4096)
    assert effective_length(averages, threshold=0.96) == EffectiveLength(None, None)
    assert effective_length({}) == EffectiveLength(None, None)


@given(st.lists(st.tuples(quarters, quarters), max_size=40))
def test_the_sign_test_counts_what_rose_and_fell(pairs):
    lost, won, p = paired_sign_test([b for b, _ in pairs], [a for _, a in pairs])
    assert (lost, won) == (sum(b > a for b, a in pairs), sum(a > b for b, a in pairs))
    # the definition: all ways of the changed samples that are at least as lopsided, out of all ways
    changed, smaller = lost + won, min(lost, won)
    ways = sum(math.comb(changed, k) for k in range(changed + 1) if min(k, changed - k) <= smaller)
    assert p == pytest.approx(float(Fraction(ways, 2**changed)))


def test_the_sign_test_needs_the_same_samples():
    with pytest.raises(ValueError, match="shorter"):
        paired_sign_test([1.0, 0.0], [1.0])
