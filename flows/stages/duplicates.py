"""Stage: manifest -> pairs of images that show the same, also flipped or rotated."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flows.study.study import here_with
from medfocus.datasets.duplicates import find_duplicates, write_pairs
from medfocus.datasets.records import read_manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the duplicates in ``--dataset``."""
    study, dataset = here_with("--dataset", __doc__, arguments)
    records = read_manifest(study.paths.manifest(dataset))
    pairs = find_duplicates(
        records,
        study.root(dataset),
        progress=sys.stderr.isatty(),
        cache=study.shared_cache("thumbnails"),
    )
    report = study.paths.report(dataset, "duplicates.csv")
    report.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(pairs, report)


if __name__ == "__main__":
    main()
