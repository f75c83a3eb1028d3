"""Stage: manifest and duplicates -> test sets and nested supports."""

from __future__ import annotations

from collections.abc import Sequence

from flows.study.study import here_with
from medfocus.datasets.duplicates import groups, read_pairs, twins
from medfocus.datasets.records import read_manifest
from medfocus.datasets.splits import draw_splits, write_splits


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the splits of ``--dataset``."""
    study, dataset = here_with("--dataset", __doc__, arguments)
    params = study.params
    records = read_manifest(study.paths.manifest(dataset))
    pairs = read_pairs(study.paths.report(dataset, "duplicates.csv"))
    splits = draw_splits(
        records,
        groups(records, pairs),
        groups(records, twins(pairs)),
        test_fraction=params.splits.test_fraction,
        fractions=[percent / 100 for percent in params.study.percents],
        shots=params.study.shots,
        seeds=params.study.seeds,
    )
    path = study.paths.splits(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_splits(splits, path)


if __name__ == "__main__":
    main()
