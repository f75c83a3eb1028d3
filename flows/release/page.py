"""The page of an evaluated study, reports/index.html: one self-contained file."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flows.release.explanations import sentences, write_attribution
from flows.release.facts import Facts
from flows.study import costs, models
from flows.study.cells import plan
from flows.study.dataset import EncodedDataset
from flows.study.study import Study, open_study
from medfocus.evaluation.comparison import compare
from medfocus.reports.page import render
from medfocus.reports.page_content import Cost, PageContent, Provenance
from medfocus.reports.rows import StudyRow, read_published, read_rows
from medfocus.storage import atomic
from medfocus.tracking import runs
from medfocus.tracking.provenance import made_from


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of an evaluated study and print its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="a study's params.yaml")
    print(write_page(open_study(parser.parse_args(arguments).params)))


def write_page(study: Study) -> Path:
    """Write reports/index.html and reports/attribution.csv of an evaluated study; return the page's path.

    MLflow keeps a copy of the page with the study's run.
    """
    paths = study.paths
    with contextlib.chdir(study.folder):
        rows = read_rows(paths.study if paths.study.exists() else paths.results)
        facts = _gather(study)
        if facts.explained:
            write_attribution(facts.explained, paths.attribution)
        text = render(_report(study, rows, facts))
        store = runs.start(None, study.home, study.params.tracking.experiment)
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, paths.page.name)
            temporary.write_text(text, encoding="utf-8")
            if run_id := rows[0].mlflow_run_id:
                store.log_page(run_id, temporary)
            atomic.write(paths.page, temporary.read_bytes())  # last, because it marks the work as complete
    return paths.page


def _gather(study: Study) -> Facts:
    """Collect the facts of all data sets, in the study's order."""
    cells = plan(study.params)
    encoder = models.build_encoder(study)
    facts = Facts()
    for name in study.params.datasets:
        facts.add(EncodedDataset(study, name, encoder), [cell for cell in cells if cell.dataset == name])
    return facts


def _report(study: Study, rows: Sequence[StudyRow], facts: Facts) -> PageContent:
    settings = study.params.report
    differences = compare(facts.tests, settings.baseline, np.random.default_rng(0))
    return PageContent(
        study.params.study.name,
        rows=rows,
        baseline=settings.baseline,
        schedule=study.params.study.schedule,
        differences=dict(zip(facts.blocks, differences, strict=True)),
        published=read_published(study.folder / settings.published) if settings.published else (),
        verdicts=sentences(facts.explained),
        gallery=facts.gallery,
        confusions=facts.confusions,
        calibrations=facts.calibrations,
        sets=facts.sets,
        recalls=facts.recalls,
        masks=facts.masks,
        warnings=facts.warnings,
        costs=_costs(study, rows),
        provenance=_provenance(study),
    )


def _costs(study: Study, rows: Sequence[StudyRow]) -> list[Cost]:
    """Return the mean costs of each system's cells at its largest support, in the order of the table."""
    lines = costs.read_rows(study.paths.costs)
    means = []
    for system in dict.fromkeys(row.system for row in rows):
        of_system = [line for line in lines if line.system == system]
        if not of_system:
            continue
        largest = max(line.percent_of_train for line in of_system)
        of_system = [line for line in of_system if line.percent_of_train == largest]
        peaks = [line.peak_mib for line in of_system if line.peak_mib is not None]
        note = "; ".join(dict.fromkeys(line.note for line in of_system if line.note))
        means.append(
            Cost(
                f"{system} ({note})" if note else system,
                float(np.mean([line.fit_seconds for line in of_system])),
                float(np.mean([line.images_per_second for line in of_system])),
                max(peaks) if peaks else None,
                of_system[0].learnt,
            )
        )
    return means


def _provenance(study: Study) -> Provenance:
    folder = Path(study.folder).resolve().relative_to(study.home.resolve())
    command = "make run" if folder == Path() else f"make run PARAMS={(folder / 'params.yaml').as_posix()}"
    facts = made_from(study.folder, study.params.study.seeds)
    return Provenance(command, facts, Path("params.yaml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
