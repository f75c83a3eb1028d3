"""The packages that users install."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from benchmarks import licences
from flows.cli import new

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_imports_no_large_library() -> None:
    code = "import sys, medfocus; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "mlflow", "prefect", "pandas"} & set(result.stdout.split())


def built(target: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel with the locked hatchling."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (package,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return package


def tracked(*under: str) -> set[str]:
    command = ["git", "ls-files", *under]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines())


def test_the_wheel_contains_the_packages_and_their_data(tmp_path: Path) -> None:
    held = set(zipfile.ZipFile(built("wheel", ROOT, tmp_path)).namelist())
    assert tracked("medfocus", "flows") <= held
    project = {f"flows/project/{name}" for name in new.FILES if name != "params.yaml"}
    assert project | {"medfocus/params.yaml"} <= held
    assert not any(name.startswith(("tests", "data")) for name in held)


def test_the_sdist_is_complete_and_gives_the_same_wheel(tmp_path: Path) -> None:
    sdist = built("sdist", ROOT, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    texts = {"README.md", "CHANGELOG.md", "LICENSE", "THIRD_PARTY.md", "requirements.lock", "params.yaml"}
    assert tracked("medfocus", "flows", "docs", "studies/*.yaml", "examples", "dvc.yaml") | texts <= held
    others = {name for name in held if not name.startswith(("medfocus/", "flows/", "docs/"))}
    assert others <= tracked() | {"PKG-INFO"}, "a checkout's own studies and data stay out of the sdist"
    wheels = [zipfile.ZipFile(built("wheel", folder, tmp_path / folder.name)) for folder in (ROOT, source)]
    direct, from_sdist = ({each.filename: each.CRC for each in wheel.infolist()} for wheel in wheels)
    assert direct == from_sdist


def test_third_party_lists_the_licence_of_every_direct_dependency() -> None:
    packages, _, _ = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8").partition("\n## Weights")
    listed = packages.splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in listed if line.startswith("| ")]
    dependencies = licences.direct()
    assert len(dependencies) > 50 and set(names) == {"package", *dependencies}
    rows = [licences.row(name, part) for name, part in dependencies.items()]
    assert [row for row in rows if row and row not in listed] == []
    assert sum(row is not None for row in rows) > 50
    assert "not named" not in "".join(listed)


def test_the_lock_pins_every_package_by_hash_and_names_no_registry() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[a-z0-9][\w.-]*==\S+", text, re.MULTILINE)
    assert len(pins) > 200
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text


def test_the_lock_satisfies_the_declared_dependencies() -> None:
    import tomllib
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name)), line
