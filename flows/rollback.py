"""Roll a data set's model back to the previous champion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.study.study import open_study
from medfocus.tracking import registry, runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Roll back the model of ``--dataset``, or of the only data set of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    parser.add_argument("--dataset", help="needed if the study has several data sets")
    options = parser.parse_args(arguments)
    study = open_study(options.params)
    names = list(study.params.datasets)
    dataset = options.dataset or (names[0] if len(names) == 1 else None)
    if dataset not in names:
        sys.exit(
            f"rollback: no data set chosen. Run `make rollback DATASET=` with one of {', '.join(names)}."
        )
    store = runs.start(None, study.home, study.params.tracking.experiment)
    try:
        before, now = registry.rollback(store, f"medfocus-{dataset}")
    except ValueError as error:
        sys.exit(f"rollback: {error}")
    print(f"medfocus-{dataset}: version {now} is champion again; version {before} was rolled back.")


if __name__ == "__main__":
    main()
