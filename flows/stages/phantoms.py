"""Stage: parameters -> a procedural data set in data/phantoms/."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from flows.study.study import here_with
from medfocus import phantoms


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the images of ``--modality`` and their known regions."""
    study, modality = here_with("--modality", __doc__, arguments)
    params, folder = study.params.phantoms[modality], study.paths.phantoms(modality)
    for unfinished in folder.parent.glob(f".{modality}-????????"):  # left by a killed run
        shutil.rmtree(unfinished)
    phantoms.write(
        folder,
        modality,
        seed=params.seed,
        train_per_class=params.train_per_class,
        test_per_class=params.test_per_class,
        size=params.size,
    )


if __name__ == "__main__":
    main()
