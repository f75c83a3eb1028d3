"""Claims about retraining: it takes in new images, the gate decides, and a rollback restores the champion."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from PIL import Image

from flows import rollback
from flows.retrain import retrain
from flows.stages import masks
from medfocus import phantoms
from medfocus.masks.store import Cached, cache_masks

NAME = "medfocus-phantom-breast"


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def arrive(folder: Path, first: int, count: int, invert: bool = False, labels: Any = None) -> None:
    """Draw more images of each class, for training and for the test."""
    for split in ("train", "test"):
        for label in labels or phantoms.MODALITIES["breast_ultrasound"]:
            target = folder / split / label
            target.mkdir(parents=True, exist_ok=True)
            drawn_as = label if label in phantoms.MODALITIES["breast_ultrasound"] else "cyst"
            for number in range(first, first + count):
                seed = 5 if drawn_as == label else 6
                rng = phantoms.generator(seed, "breast_ultrasound", split, drawn_as, number)
                image = phantoms.draw("breast_ultrasound", drawn_as, rng, 96).image
                Image.fromarray(255 - image if invert else image).save(target / f"{number}.png")


@pytest.fixture
def clinic(project: Path) -> Path:
    """The folder into which a project's images arrive."""
    folder = project / "incoming"
    content = yaml.safe_load((project / "params.yaml").read_text())
    content["datasets"]["phantom-breast"]["root"] = "incoming"
    content["phantoms"] = {}
    content["study"] |= {"methods": {"pixels": ["none"]}, "percents": [100], "seeds": [0]}
    content["validation"] |= {"methods": ["pixels"]}
    content["gate"] |= {"images": 5}
    (project / "params.yaml").write_text(yaml.safe_dump(content))
    arrive(folder, 0, 6)
    return folder


def change(**changes: Any) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["gate"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(content))


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{Path('mlflow.db').resolve()}")


def champion() -> int:
    return int(client().get_model_version_by_alias(NAME, "champion").version)


def test_new_images_are_taken_in_and_the_champion_changes_only_by_the_gate(
    clinic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    segmented: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> Cached:
        segmented.append((cached := cache_masks(*arguments, **settings)).computed)
        return cached

    monkeypatch.setattr(masks, "cache_masks", counted)
    (first,) = retrain()
    assert first.reason.startswith("promoted: ") and champion() == 1
    assert segmented == [36]

    segmented.clear()
    (again,) = retrain()
    assert (again.version, again.reason) == ("1", "it is the champion already") and not segmented

    # More images of the same kind: only these are segmented, and a tie or chance does not pass the gate.
    arrive(clinic, 6, 6)
    change(p=1e-9)
    (refused,) = retrain()
    assert segmented == [36]
    assert refused.alias is None and "paired test: p " in refused.reason and champion() == 1
    assert client().get_model_version(NAME, "2").tags["gate"] == refused.reason
    runs = client().search_runs(["1"], "tags.gate LIKE 'refused%'")
    assert [run.data.tags["gate"] for run in runs] == [refused.reason]

    # The same challenger passes a laxer gate and can be rolled back.
    change(p=1.0, margin=-0.9)
    (admitted,) = retrain()
    assert admitted.version == "2" and champion() == 2
    assert "drift of embedding" in admitted.reason
    rollback.main([])
    assert champion() == 1 and "version 1 is champion again" in capsys.readouterr().out
    (held,) = retrain()
    assert "it was rolled back on" in held.reason and champion() == 1

    # Images of another kind: the model is trained and registered, but not promoted.
    arrive(clinic, 12, 8, invert=True)
    (drifted,) = retrain()
    assert drifted.version == "3" and drifted.alias is None
    assert "drift of " in drifted.reason and "required" in drifted.reason and champion() == 1

    # A class that the champion does not know prevents the promotion, but not the training.
    shutil.rmtree(clinic)
    arrive(clinic, 0, 12, labels=("benign", "malignant", "cyst", "scar"))
    (relabelled,) = retrain()
    assert relabelled.version == "4" and "classes: benign, cyst, malignant, scar" in relabelled.reason
    assert champion() == 1
    with pytest.raises(SystemExit, match="version 1 is the first champion"):
        rollback.main([])
    assert np.load("data/predictions/phantom-breast.npz", allow_pickle=False)["classes"].tolist() == [
        "benign", "cyst", "malignant", "scar"
    ]  # fmt: skip
