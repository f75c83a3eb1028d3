"""The share of Prefect, MLflow and DVC in a study's wall time.

Runs `make run` in a fresh clone with empty caches. Bookkeeping is all time outside of the stages and the
page, and the time that these spend on MLflow. This includes the start of Prefect's server, the check of the
plan, and the registration of the best models with its trial predictions.

    python -m benchmarks.bookkeeping
    python -m benchmarks.bookkeeping --params studies/chest_ct.yaml
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clone import ROOT, clone
from flows.study.content import moved_paths, read_content

MOST = 0.05
ENOUGH = 600.0  # seconds; the bound applies to studies of at least this length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--seeds", type=int, default=5, help="draws of each support")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        content = moved_paths(read_content(options.params), options.params.resolve().parent, project)
        if options.params.resolve() == ROOT / "params.yaml":  # its images are drawn in the clone
            content = read_content(options.params)
        content["study"] |= {"seeds": list(range(options.seeds))}
        environment = clone(project, content)
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED], cwd=project, env=environment, stdout=subprocess.PIPE, text=True
        )
    if done.returncode:
        raise SystemExit(f"the study failed with exit status {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    compute = result["stages_s"] + result["page_s"] - result["mlflow_s"]
    share = (result["wall_s"] - compute) / result["wall_s"]
    verdict = "reached" if share <= MOST else f"FALLS SHORT by {share - MOST:.3f}"
    if result["wall_s"] < ENOUGH:
        verdict += f"; the bound applies from {ENOUGH:.0f} s, because much of the time is constant"
    for name, value in result.items():
        print(f"{name:12} {value:8.1f}")
    print(f"bookkeeping: {share:.3f} of the wall time, at most {MOST}: {verdict}")
    if options.json:
        print(json.dumps({**result, "bookkeeping": round(share, 4)}))


_MEASURED = """
import json, time
from flows import pipeline
from flows.release import page
from flows.stages import dvc_patches
from medfocus.tracking import runs

spent = {"stages_s": 0.0, "page_s": 0.0, "mlflow_s": 0.0}

def timed(run, name):
    def measured(*arguments, **options):
        began = time.perf_counter()
        try:
            return run(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - began
    return measured

dvc_patches.run_here = timed(dvc_patches.run_here, "stages_s")
page.write_page = timed(page.write_page, "page_s")
runs.start = timed(runs.start, "mlflow_s")
for method in ("log_cell", "log_figure", "log_table"):
    setattr(runs.StudyRun, method, timed(getattr(runs.StudyRun, method), "mlflow_s"))
began = time.perf_counter()
pipeline.main([])
spent = {"wall_s": time.perf_counter() - began, **spent}
print(json.dumps({name: round(value, 1) for name, value in spent.items()}))
"""


if __name__ == "__main__":
    main()
