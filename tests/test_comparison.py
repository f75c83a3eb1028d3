"""Paired tests agree with independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from medfocus.evaluation.comparison import Scored, bootstrap, compare, holm, mcnemar, paired_sums, sign_flip


def results(*accuracies: float, images: int = 60, seed: int = 0) -> np.ndarray:
    """(R, N) bool, one draw per accuracy; draws fail on the same hard images."""
    rng = np.random.default_rng(seed)
    hard = rng.random(images)
    return np.stack([hard + 0.2 * rng.random(images) < 1.2 * accuracy for accuracy in accuracies])


def test_the_sign_flip_test_of_one_draw_is_mcnemars_exact_test() -> None:
    for seed in range(5):
        ours, theirs = results(0.8, seed=seed), results(0.6, seed=seed + 100)
        sums, _, _ = paired_sums(ours, theirs)
        assert sign_flip(sums) == pytest.approx(mcnemar(ours[0], theirs[0])[2], rel=1e-9)


def test_mcnemar_is_the_binomial_test_of_the_discordant_images() -> None:
    ours = np.array([True] * 9 + [False] * 2 + [True] * 5 + [False] * 4)
    theirs = np.array([False] * 9 + [True] * 2 + [True] * 5 + [False] * 4)
    only_ours, only_theirs, p = mcnemar(ours, theirs)
    assert (only_ours, only_theirs) == (9, 2)
    assert p == pytest.approx(2 * (1 + 11 + 55) / 2**11)  # C(11, 0) + C(11, 1) + C(11, 2)
    assert mcnemar(ours, ours) == (0, 0, 1.0)


def test_sign_flips_count_every_assignment_of_signs() -> None:
    for sums in ([3, 1, -2, 5, 0, 1], [2, 4, 4, -2], [1], [5, -5], [0, 0]):
        seen = abs(sum(sums))
        all_sums = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
        assert sign_flip(np.array(sums)) == pytest.approx(np.mean(np.array(all_sums) >= seen))


def test_sign_flips_agree_with_scipys_permutation_test() -> None:
    sums, _, _ = paired_sums(results(0.8, 0.7, 0.75, images=14), results(0.5, 0.6, 0.6, images=14, seed=3))
    paired = stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=2**14, alternative="two-sided"
    )
    assert sign_flip(sums) == pytest.approx(float(paired.pvalue), rel=1e-9)


def test_repeating_a_draw_adds_no_evidence() -> None:
    """A sum of discordant counts over draws would lower p with every repetition."""
    ours, theirs = results(0.8), results(0.65, seed=7)
    once = sign_flip(paired_sums(ours, theirs)[0])
    assert sign_flip(paired_sums(np.repeat(ours, 5, axis=0), np.repeat(theirs, 5, axis=0))[0]) == once
    discordant = 5 * np.array(mcnemar(ours[0], theirs[0])[:2])
    assert stats.binomtest(int(discordant[0]), int(discordant.sum())).pvalue < once / 10


def test_equal_systems_differ_no_more_often_than_the_level() -> None:
    """400 pairs of equal systems with five correlated draws each, at the level 0.05."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        ours, theirs = (
            (0.7 + 0.3 * rng.standard_normal(50) + 0.1 * rng.standard_normal((5, 50))) > 0.5 for _ in range(2)
        )
        found += sign_flip(paired_sums(ours, theirs)[0]) < 0.05
    assert found <= stats.binom.ppf(0.999, 400, 0.05)
    assert found > 4  # the test has power


def test_unequal_numbers_of_draws_are_compared_by_their_means() -> None:
    ours, theirs = results(0.8, 0.7), results(0.6, 0.5, 0.6, seed=2)
    sums, sizes, scale = paired_sums(ours, theirs)
    assert scale == 6 and sizes.sum() == 60
    np.testing.assert_allclose(sums / scale, ours.mean(axis=0) - theirs.mean(axis=0))


def test_the_images_of_a_patient_are_one_unit() -> None:
    ours, theirs = results(0.8, images=12), results(0.4, images=12, seed=5)
    patients = np.array(list("aabbbcddefgh"))
    sums, sizes, _ = paired_sums(ours, theirs, patients)
    expected = [int(ours[0, patients == p].sum()) - int(theirs[0, patients == p].sum()) for p in "abcdefgh"]
    assert sums.tolist() == expected
    assert sizes.tolist() == [2, 3, 1, 2, 1, 1, 1, 1]


def test_the_bootstrap_agrees_with_resampling_of_images() -> None:
    """Compare with plain resampling of indices and with the normal interval of a mean."""
    ours, theirs = results(0.8, 0.75, images=200), results(0.7, 0.66, images=200, seed=4)
    sums, sizes, scale = paired_sums(ours, theirs)
    low, high, p = bootstrap(sums / scale, sizes, np.random.default_rng(0), 20_000)
    each = ours.mean(axis=0) - theirs.mean(axis=0)
    rng = np.random.default_rng(1)
    means = np.array([each[rng.integers(0, 200, 200)].mean() for _ in range(20_000)])
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.004)
    error = each.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((each.mean() - 1.96 * error, each.mean() + 1.96 * error), abs=0.006)
    assert p == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.01)


def test_the_bootstrap_of_patients_resamples_patients() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    each = np.repeat(rng.integers(-1, 2, 40), np.bincount(patients))  # images of a patient are equal
    sums, sizes = np.bincount(patients, each), np.bincount(patients)
    low, high, _ = bootstrap(sums, sizes, np.random.default_rng(0), 20_000)
    drawn = rng.integers(0, 40, (20_000, 40))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.015)
    alone = bootstrap(each, np.ones(len(each), int), np.random.default_rng(0), 20_000)
    assert high - low > 1.5 * (alone[1] - alone[0])  # independent images give too narrow an interval


def test_the_bootstrap_repeats_with_its_seed_and_never_gives_a_p_of_zero() -> None:
    sums, sizes = np.array([1] * 30 + [0] * 30), np.ones(60, int)
    first, second, other = (bootstrap(sums, sizes, np.random.default_rng(s), 999) for s in (0, 0, 1))
    assert first == second != other
    assert first[2] == pytest.approx(2 / 1000)
    assert bootstrap(np.zeros(60), sizes, np.random.default_rng(0), 999) == (0, 0, 1)
    with pytest.raises(ValueError, match="0 resamples; 10000 are usual"):
        bootstrap(sums, sizes, np.random.default_rng(0), 0)


def test_holm_matches_a_computation_by_hand() -> None:
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 is lifted to the one before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"p-values from -1\.0 to 0\.5; give values in \[0, 1\]"):
        holm([0.5, -1])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(12) ** 4
        rejected = np.zeros(12, bool)
        for step, place in enumerate(np.argsort(p)):
            if p[place] > 0.05 / (12 - step):
                break
            rejected[place] = True
        np.testing.assert_array_equal(holm(p.tolist()) <= 0.05, rejected)


def test_every_system_is_compared_at_its_own_percent_and_corrected_over_all_test_sets() -> None:
    base, better = results(0.6, 0.6), results(0.85, 0.85)
    test = Scored(
        {("clip", 5.0): base, ("clip", 10.0): base, ("ours", 5.0): better, ("pixels", 20.0): better}
    )
    found = compare([test, test], "clip", np.random.default_rng(0), 500)
    assert [list(block) for block in found] == [[("ours", 5.0)]] * 2
    difference = found[0]["ours", 5.0]
    assert difference.mean == pytest.approx(better.mean() - base.mean())
    assert difference.low <= difference.mean <= difference.high
    assert (difference.draws, difference.images) == (2, 60)
    assert difference.adjusted_p == pytest.approx(2 * difference.p)


def test_a_baseline_without_training_images_is_compared_at_every_percent() -> None:
    zero, ours = results(0.5), results(0.8, 0.8)
    test = Scored({("zero-shot", 0.0): zero, ("ours", 5.0): ours, ("ours", 100.0): ours})
    (found,) = compare([test], "zero-shot", np.random.default_rng(0), 500)
    assert list(found) == [("ours", 5.0), ("ours", 100.0)]


def test_an_unknown_baseline_and_mismatched_images_are_refused() -> None:
    one = results(0.5)
    test = Scored({("pixels", 5.0): one, ("ours", 5.0): one})
    with pytest.raises(ValueError, match=r"no result of the baseline 'clip'; the systems are ours, pixels\."):
        compare([test], "clip", np.random.default_rng(0))
    with pytest.raises(
        ValueError, match="60 images, but 50 in the other arrays; give the same images in the same order"
    ):
        paired_sums(results(0.5), results(0.5, images=50))
    with pytest.raises(ValueError, match=r"results of shape \(0, 60\) and \(1, 60\); give at least one draw"):
        paired_sums(results(0.5)[:0], results(0.5))
