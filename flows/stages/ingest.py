"""Stage: a data set's folder or CSV -> one manifest, and what was left out or is worth knowing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.study.study import here
from medfocus.datasets import pseudonyms
from medfocus.datasets.faults import write_faults
from medfocus.datasets.ingest import ingest
from medfocus.datasets.listing import unwrapped
from medfocus.datasets.records import write_manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Check every image of ``--dataset`` and write data/manifests and reports/data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    dataset = parser.parse_args(arguments).dataset
    study = here()
    params, root = study.params.datasets[dataset], study.root(dataset)
    if params.manifest is None and root.is_dir() and (top := unwrapped(root)) != root:
        print(f"{dataset}: {params.root} only wraps {top.relative_to(root)}: read there", file=sys.stderr)
    found = ingest(
        root,
        manifest=params.manifest,
        columns=params.columns,
        patient_pattern=params.patient_pattern,
        progress=sys.stderr.isatty(),
        cache=study.shared_cache("images"),
        slices=(params.slices.axis, params.slices.every),
        salt_file=study.home / pseudonyms.FILE,
    )
    reports = Path("reports/data", dataset)
    reports.mkdir(parents=True, exist_ok=True)
    write_faults(found.left_out, reports / "left_out.csv")
    write_faults(found.reported, reports / "reported.csv")
    manifest = Path("data/manifests", f"{dataset}.csv")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(found.records, manifest)
    for name, faults in (("left_out", found.left_out), ("reported", found.reported)):
        if faults:
            words = "left out" if name == "left_out" else "kept, with a fault"
            print(f"{dataset}: {len(faults)} {words}: {reports / name}.csv", file=sys.stderr)


if __name__ == "__main__":
    main()
