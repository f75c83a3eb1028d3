"""Audit the packages of requirements.lock with pip-audit; `make check` runs this.

    python -m benchmarks.audit [requirements.lock]

The audit asks the package index over the network. If the index does not answer, or does not know a famous
vulnerability, the audit prints NOT AUDITED with the reason, and passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CANARY = "jinja2==3.1.2"  # has CVE-2024-22195: an index that does not know it has no data
SECONDS = 20  # for the canary
SECONDS_FOR_ALL = 180


class NotAuditedError(RuntimeError):
    """The reason why an audit is impossible."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the known vulnerabilities of the pinned packages; return 1 if there are any, else 0."""
    words = sys.argv[1:] if arguments is None else arguments
    requirements = Path(words[0]) if words else Path("requirements.lock")
    try:
        check_canary()
        packages = ask(requirements, SECONDS_FOR_ALL)
    except NotAuditedError as error:
        print(f"{requirements}: NOT AUDITED: {error}")
        return 0
    skipped = sorted(package["name"] for package in packages if "skip_reason" in package)
    vulnerable = [(package, known) for package in packages for known in package.get("vulns", [])]
    for package, known in vulnerable:
        fixed = ", ".join(known["fix_versions"]) or "no version"
        print(f"{requirements}: {package['name']} {package['version']}: {known['id']}, fixed in {fixed}")
    if skipped:
        print(f"{requirements}: NOT AUDITED, because the index does not know them: {', '.join(skipped)}")
    print(
        f"{requirements}: {len(packages) - len(skipped)} packages audited, {len(vulnerable)} vulnerabilities"
    )
    return 1 if vulnerable else 0


def check_canary() -> None:
    """Raise NotAuditedError if the index does not know a famous vulnerability."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "canary.txt")
        requirements.write_text(f"{CANARY}\n")
        packages = ask(requirements, SECONDS)
    if not any(package.get("vulns") for package in packages):
        raise NotAuditedError(f"the package index knows no vulnerability of {CANARY}, which has several")


def ask(requirements: Path, seconds: int) -> list[dict[str, Any]]:
    """Return pip-audit's result for each pinned package, without resolving or installing any."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--format", "json"]
    command += ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise NotAuditedError(f"pip-audit did not finish in {seconds} s") from error
    try:
        return json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError) as error:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise NotAuditedError(f"pip-audit failed: {lines[-1][:200]}") from error


if __name__ == "__main__":
    sys.exit(main())
