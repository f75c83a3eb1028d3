"""Stage: a data set's folder or table -> its manifest, and reports of faulty files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flows.study.study import here_with
from medfocus.datasets import pseudonyms
from medfocus.datasets.faults import write_faults
from medfocus.datasets.ingest import ingest
from medfocus.datasets.listing import unwrapped
from medfocus.datasets.records import write_manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Check every image of ``--dataset``; write its manifest and reports."""
    study, dataset = here_with("--dataset", __doc__, arguments)
    params, root = study.params.datasets[dataset], study.root(dataset)
    if params.manifest is None and root.is_dir() and (top := unwrapped(root)) != root:
        print(
            f"{dataset}: {params.root} only wraps {top.relative_to(root)}, which is read instead",
            file=sys.stderr,
        )
    ingested = ingest(
        root,
        manifest=params.manifest,
        columns=params.columns,
        patient_pattern=params.patient_pattern,
        progress=sys.stderr.isatty(),
        cache=study.shared_cache("images"),
        slices=(params.slices.axis, params.slices.every),
        salt_file=study.home / pseudonyms.FILE,
    )
    left_out, reported = (study.paths.report(dataset, f"{name}.csv") for name in ("left_out", "reported"))
    left_out.parent.mkdir(parents=True, exist_ok=True)
    write_faults(ingested.left_out, left_out)
    write_faults(ingested.reported, reported)
    manifest = study.paths.manifest(dataset)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(ingested.records, manifest)
    for report, faults, words in (
        (left_out, ingested.left_out, "left out"),
        (reported, ingested.reported, "kept, with a fault"),
    ):
        if faults:
            place = report.relative_to(study.folder)
            print(f"{dataset}: {len(faults)} {words}: {place}", file=sys.stderr)


if __name__ == "__main__":
    main()
