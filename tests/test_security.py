"""No code makes unsafe calls, and servers listen only on loopback; docs/security.md explains why."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.servers import processes
from flows.servers.mlflow import mlflow_server
from flows.servers.prefect import prefect_server
from flows.study import runners
from flows.study.params import ScaleParams

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("medfocus", "flows", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# Reason -> calls; ``is_safe`` has the exceptions.
FORBIDDEN = {
    "unpickles": (
        *(
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "cloudpickle.load",
            "cloudpickle.loads",
            "dill.load",
        ),
        *("dill.loads", "joblib.load", "pandas.read_pickle", "shelve.open", "marshal.load", "marshal.loads"),
        *("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load"),
    ),
    "builds objects named in a YAML file": (
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
    ),
    "runs text": ("eval", "exec", "os.system", "os.popen"),
    "unpacks an archive to paths that it names": ("shutil.unpack_archive", "tarfile.open"),
}
FORBIDDEN_METHODS = ("extract", "extractall")  # of any archive


def faults(source: str) -> Iterator[str]:
    """Yield the forbidden calls under their imported names."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, _, rest = ast.unparse(call.func).partition(".")
        name = ".".join(filter(None, (known.get(first, first), rest)))
        for reason, names in FORBIDDEN.items():
            if name in names and not is_safe(name, call):
                yield f"line {call.lineno}: {name} {reason}"
        if isinstance(call.func, ast.Attribute) and call.func.attr in FORBIDDEN_METHODS:
            yield f"line {call.lineno}: {call.func.attr} unpacks an archive to paths that it names"
        if any(given(call, word) is True for word in ("shell", "trust_remote_code")):
            yield f"line {call.lineno}: runs text"


def is_safe(name: str, call: ast.Call) -> bool:
    if name == "torch.load":
        return given(call, "weights_only") is True
    return name == "numpy.load" and given(call, "allow_pickle") is False


def given(call: ast.Call, keyword: str) -> object:
    """Return the constant value of a keyword of a call."""
    values = [k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)]
    return values[0] if values else None


def test_no_code_unpickles_runs_text_or_unpacks_an_archive() -> None:
    assert len(SOURCES) > 100
    found = [
        f"{path.relative_to(ROOT)}, {fault}" for path in SOURCES for fault in faults(path.read_text("utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import load as read\nread(file)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "def f():\n    import numpy as np\n    np.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import joblib\njoblib.load(path)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import zipfile\nzipfile.ZipFile(path).extractall(folder)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_forbidden_call_is_found_under_any_name(source: str) -> None:
    assert len(list(faults(source))) == 1


def test_safe_calls_are_not_reported() -> None:
    source = (
        "import numpy as np, torch, yaml\nmodel.eval()\nnp.load(path, allow_pickle=False)\n"
        "torch.load(path, weights_only=True)\nyaml.safe_load(text)"
    )
    assert not list(faults(source))


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_server_is_configured_to_listen_on_loopback_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    @contextlib.contextmanager
    def recorded(command: list[str], *_: object, **__: object) -> Iterator[None]:
        started.append(command)
        yield

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(processes, "running", recorded)
    port = processes.free_port()
    with prefect_server(port) if name == "prefect" else mlflow_server(tmp_path, port):
        pass
    (command,) = started
    assert name in command and command[command.index("--host") + 1] == "127.0.0.1"


def listening() -> set[str]:
    """Return the addresses on which this process and its children listen."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    connections = [c for process in family for c in process.net_connections("inet")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_a_local_cluster_listens_on_loopback_only() -> None:
    from distributed import LocalCluster

    scale = ScaleParams(runner="dask", workers=1, images=10, address=None, cache=None)
    with LocalCluster(**runners._runner(scale).cluster_kwargs):  # pyright: ignore
        assert listening() == {"127.0.0.1"}
