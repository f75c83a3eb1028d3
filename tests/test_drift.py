"""Images of the same kind do not drift, other kinds do, and few images are not significant."""

from __future__ import annotations

import contextlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp

from medfocus.evaluation import drift
from medfocus.evaluation.drift import Images, Known, measure, statistics

BOUNDS = {"embedding": 0.8, "coverage": 0.4, "classes": 0.3, "statistics": 0.5}


def drawn(count: int, seed: int) -> Images:
    """Images of one kind: two classes and 16 features."""
    rng = np.random.default_rng(seed)
    return Images(
        labels=rng.choice(["benign", "malignant"], count),
        embeddings=rng.normal(size=(count, 16)).astype(np.float32),
        coverage=rng.beta(2, 8, count),
        statistics=rng.normal(size=(count, len(drift.STATISTICS))),
        encoder="tower",
    )


def past(old: Images, new: Images) -> list[str]:
    return [shift.name for shift in measure(old, new, BOUNDS, p=0.01) if shift.past]


def test_images_of_the_same_kind_do_not_drift() -> None:
    old = drawn(300, 0)
    assert [past(old, drawn(60, seed)) for seed in range(1, 21)] == [[]] * 20


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("embedding", lambda p: replace(p, embeddings=p.embeddings + 0.8)),
        ("coverage", lambda p: replace(p, coverage=1 - p.coverage)),
        ("classes", lambda p: replace(p, labels=np.full(len(p.labels), "benign"))),
        ("statistics", lambda p: replace(p, statistics=p.statistics + np.array([0, 0, 3, 0, 0]))),
    ],
)
def test_each_kind_of_drift_is_found_alone(name: str, change: object) -> None:
    assert past(drawn(300, 0), change(drawn(60, 1))) == [name]  # pyright: ignore[reportCallIssue]


def test_a_new_class_is_a_drift_of_the_class_shares() -> None:
    new = drawn(60, 1)
    assert past(drawn(300, 0), replace(new, labels=np.where(np.arange(60) < 30, "cyst", new.labels))) == [
        "classes"
    ]


def test_a_large_difference_of_few_images_is_not_significant() -> None:
    new = drawn(4, 1)
    shifts = measure(drawn(300, 0), replace(new, embeddings=new.embeddings + 9), BOUNDS, p=0.01)
    assert not any(shift.past for shift in shifts)
    assert [shift.name for shift in shifts if np.isnan(shift.value)] == [
        "embedding",
        "coverage",
        "statistics",
    ]


def test_embeddings_of_two_encoders_are_not_compared() -> None:
    shifts = measure(drawn(300, 0), replace(drawn(60, 1), encoder="another"), BOUNDS, p=0.01)
    assert np.isnan(shifts[0].value) and not shifts[0].past


def test_distances_agree_with_scipy_and_scikit_learn() -> None:
    old, new = drawn(80, 0), drawn(40, 1)
    coverage = measure(old, new, BOUNDS, 0.01)[1]
    reference = ks_2samp(old.coverage, new.coverage)
    assert (coverage.value, coverage.p) == (reference.statistic, reference.pvalue)  # pyright: ignore
    shares = [[np.mean(p.labels == name) for name in ("benign", "malignant")] for p in (old, new)]
    variation = cdist(shares[:1], shares[1:], "cityblock").item() / 2
    assert measure(old, new, BOUNDS, 0.01)[2].value == pytest.approx(variation)


def test_statistics_respond_to_brightness_contrast_and_size() -> None:
    rng = np.random.default_rng(0)
    grey = rng.uniform(0.2, 0.6, (64, 128))
    base = statistics(grey)
    names = dict(zip(drift.STATISTICS, base, strict=True))
    assert names["aspect"] == 1 and names["pixels"] == 13
    assert statistics(grey + 0.2)[0] == pytest.approx(base[0] + 0.2)
    assert statistics(grey / 2)[1] == pytest.approx(base[1] / 2)
    assert statistics(np.full((64, 64), 0.5))[2] < base[2]


def test_known_images_are_read_back(tmp_path: Path) -> None:
    names = frozenset(f"{i:064x}" for i in range(40))
    known = Known(names, frozenset(f"{i:064x}" for i in range(7)), drawn(40, 0))
    known.save(tmp_path / "known.npz")
    back = Known.load(tmp_path / "known.npz")
    assert (back.names, back.learnt) == (known.names, known.learnt)
    assert (back.sample.labels == known.sample.labels).all() and back.sample.encoder == "tower"
    np.testing.assert_allclose(back.sample.embeddings, known.sample.embeddings, atol=2e-3)
    np.testing.assert_array_equal(back.sample.statistics, known.sample.statistics)


@pytest.mark.parametrize("what", ["a pickle", "a bomb", "no archive"])
def test_an_invalid_archive_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "known.npz"
    if what == "a pickle":
        np.savez(path, names=np.array([object()]))
    elif what == "a bomb":
        np.savez_compressed(path, names=np.zeros((100_000, 32), np.uint8))
        monkeypatch.setattr(drift, "MOST_BYTES", 1_000_000)
        assert path.stat().st_size < 10_000
    else:
        path.write_bytes(b"no archive")
    reasons = {
        "a pickle": "allow_pickle=False",
        "a bomb": "unpacks to 3 MB; the limit is 1 MB",
        "no archive": "zip",
    }
    with pytest.raises(ValueError, match=rf"known\.npz: does not hold the arrays .*{reasons[what]}.*Restore"):
        Known.load(path)


def test_names_in_an_archive_do_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "known.npz"
    Known(frozenset(), frozenset(), drawn(10, 0)).save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped.npy", b"x")
        archive.writestr(f"{tmp_path}/escaped.npy", b"x")
    with contextlib.suppress(ValueError):
        Known.load(path)
    assert {file.name for file in tmp_path.rglob("*")} == {"in", "known.npz"}
