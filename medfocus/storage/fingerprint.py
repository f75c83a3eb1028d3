"""The key of code: one sha256 over the sources and packages that a cached result depends on.

A cache names its entries by their origin: data, settings, weights and code. The code of a function is its
module and every module of this project that this module imports, directly or indirectly. The key changes if
one of these modules changes, or a package in ``_PACKAGES`` that they import. So no cache returns a result of
older code.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).parents[2]  # holds the packages medfocus and flows
_OWN = ("medfocus", "flows")

# Import name -> distributions that can change results. pydicom decodes with gdcm; open_clip uses timm.
_PACKAGES = {
    "PIL": ("pillow",),
    "gdcm": ("python-gdcm",),
    "mapie": ("mapie",),
    "nibabel": ("nibabel",),
    "numpy": ("numpy",),
    "open_clip": ("open_clip_torch", "timm"),
    "pydicom": ("pydicom", "python-gdcm"),
    "sam2": ("sam2",),
    "scipy": ("scipy",),
    "sklearn": ("scikit-learn",),
    "timm": ("timm",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
}


def fingerprint(*code: Callable[..., object] | type | ModuleType | str, **settings: object) -> str:
    """Return the sha256 hex of code and settings.

    Args:
        code: Functions, classes, modules or dotted names of modules. A function or class stands for its
            module, and a module for its import closure. Of other projects, the packages in ``_PACKAGES`` that
            this code imports count by their versions.
        settings: Everything else that changes the result, as JSON types.
    """
    modules = tuple(sorted({_module(item) for item in code}))
    content = {"code": code_key(modules, PROJECT), "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def code_key(modules: tuple[str, ...], project: Path) -> str:
    """Return the sha256 hex of the import closures of modules and of the versions of their packages."""
    digest = hashlib.sha256()
    packages: set[str] = set()
    for file in closure(modules, project):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(project).as_posix()}\0".encode() + content + b"\0")
        packages |= {name.partition(".")[0] for name in _imported(content, "")}
    distributions = sorted({name for package in packages for name in _PACKAGES.get(package, ())})
    digest.update("".join(f"{name}=={version(name)}\0" for name in distributions).encode())
    return digest.hexdigest()


def closure(modules: tuple[str, ...], project: Path = PROJECT) -> list[Path]:
    """Return the sorted source files of modules, given by dotted name, and of all modules that they import.

    Imports inside functions count; imports for type checkers do not. A package's ``__init__.py`` counts if
    the package itself, or a name that it defines, is imported. Raises FileNotFoundError for a module that the
    project lacks.
    """
    found: set[Path] = set()
    waiting = []
    for module in modules:
        if (file := _file(module, project)) is not None:
            waiting.append((module, file))
        elif module.partition(".")[0] in _OWN:
            raise FileNotFoundError(f"{project}: no module {module}; check the spelling of its dotted name.")
    while waiting:
        module, file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for name in _imported(file.read_bytes(), package):
            imported = _file(name, project)
            if imported is None:  # the last part may be a class or function
                name = name.rpartition(".")[0]
                imported = _file(name, project)
            if imported is not None:
                waiting.append((name, imported))
    return sorted(found)


def _module(item: Callable[..., object] | type | ModuleType | str) -> str:
    if isinstance(item, str):
        return item
    return item.__name__ if isinstance(item, ModuleType) else item.__module__


def _file(module: str, project: Path) -> Path | None:
    """Return the source file of a module, or None if this project has no module of that name."""
    parts = module.split(".")
    if parts[0] not in _OWN:
        return None
    base = project.joinpath(*parts)
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def _imported(source: bytes, package: str) -> tuple[str, ...]:
    """Return the dotted names that a source imports at run time; ``from a import b`` gives a.b."""
    return tuple(_names(ast.parse(source), package))


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.orelse:
            yield from _names(child, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _names(child, package)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"
