"""Claims about the audit: it finds known vulnerabilities and never reports success without an answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import audit

KNOWN = {"id": "GHSA-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
CLEAN, BAD = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2", "vulns": [KNOWN]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def answering(monkeypatch: pytest.MonkeyPatch, canary: object, lock: object) -> list[str]:
    """Replace pip-audit by answers for the canary and the lock; return the list of the audited files."""
    asked: list[str] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(Path(command[command.index("--requirement") + 1]).name)
        answer = canary if asked[-1] == "canary.txt" else lock
        if isinstance(answer, list):
            return subprocess.CompletedProcess(command, 0, json.dumps({"dependencies": answer}), "")
        if answer is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\n{answer}\n")

    monkeypatch.setattr(audit.subprocess, "run", run)
    return asked


def test_a_known_vulnerability_fails_the_check_and_names_the_fixed_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, [BAD], [CLEAN, BAD, SKIPPED])
    assert audit.main(["x.lock"]) == 1
    printed = capsys.readouterr().out
    assert "x.lock: b 2: GHSA-1, fixed in 2.1" in printed
    assert "x.lock: NOT AUDITED, because the index does not know them: c" in printed
    assert "x.lock: 2 packages audited, 1 vulnerabilities" in printed


def test_an_audit_without_vulnerabilities_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, [BAD], [CLEAN])
    assert audit.main(["x.lock"]) == 0


@pytest.mark.parametrize(
    ("canary", "reason"),
    [
        ([CLEAN], "the package index knows no vulnerability of jinja2"),
        ([SKIPPED], "the package index knows no vulnerability of jinja2"),
        (None, "pip-audit did not finish in 20 s"),
        ("ConnectionError: no route", "pip-audit failed: ConnectionError: no route"),
    ],
)
def test_an_index_without_data_is_reported_as_not_audited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], canary: object, reason: str
) -> None:
    asked = answering(monkeypatch, canary, [BAD])
    assert audit.main(["x.lock"]) == 0
    assert capsys.readouterr().out.startswith(f"x.lock: NOT AUDITED: {reason}")
    assert asked == ["canary.txt"], "an index without data gets no further question"
