"""Known vulnerabilities of what requirements.lock pins, by pip-audit; `make check` runs it.

    python -m benchmarks.audit [requirements.lock]

It asks the package index over the network. Where that cannot be asked, or knows of no vulnerability where
there are some, it says NOT AUDITED and why, and passes: to have found nothing must not read as a clean bill.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CANARY = "jinja2==3.1.2"  # CVE-2024-22195 and more: an index that knows none of it has no data
SECONDS = 20  # for the canary
SECONDS_FOR_ALL = 180


class NotAuditedError(RuntimeError):
    """Why nothing can be said."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is known against the pinned packages; 1 where there is something, else 0."""
    given = sys.argv[1:] if arguments is None else arguments
    requirements = Path(given[0]) if given else Path("requirements.lock")
    try:
        check_canary()
        packages = ask(requirements, SECONDS_FOR_ALL)
    except NotAuditedError as error:
        print(f"{requirements}: NOT AUDITED: {error}")
        return 0
    skipped = sorted(package["name"] for package in packages if "skip_reason" in package)
    found = [(package, known) for package in packages for known in package.get("vulns", [])]
    for package, known in found:
        fixed = ", ".join(known["fix_versions"]) or "no version yet"
        print(f"{requirements}: {package['name']} {package['version']}: {known['id']}, fixed in {fixed}")
    if skipped:
        print(f"{requirements}: NOT AUDITED, as the index does not know them: {', '.join(skipped)}")
    print(
        f"{requirements}: {len(packages) - len(skipped)} packages audited, {len(found)} vulnerabilities known"
    )
    return 1 if found else 0


def check_canary() -> None:
    """Raise NotAuditedError where the index does not know a vulnerability that everyone knows."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "canary.txt")
        requirements.write_text(f"{CANARY}\n")
        packages = ask(requirements, SECONDS)
    if not any(package.get("vulns") for package in packages):
        raise NotAuditedError(
            f"the index that answers here knows no vulnerability of {CANARY}, which has some"
        )


def ask(requirements: Path, seconds: int) -> list[dict[str, Any]]:
    """What pip-audit says of each pinned package; nothing is resolved or installed."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--format", "json"]
    command += ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise NotAuditedError(f"pip-audit had no answer in {seconds} s") from error
    try:
        return json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError) as error:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise NotAuditedError(f"pip-audit could not ask; it said: {said[-1][:200]}") from error


if __name__ == "__main__":
    sys.exit(main())
