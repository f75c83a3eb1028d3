"""params.yaml: what is wrong is said at once, whole, and by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from flows.cells import CONTROLS
from medfocus.focus import FOCUS
from medfocus.params import Focus, Params, load_params

DEFAULT = Path(__file__).resolve().parents[1] / "params.yaml"


def test_the_default_params_load() -> None:
    params = load_params(DEFAULT)
    assert isinstance(params, Params)
    assert set(params.study.methods) <= set(params.methods)


def test_a_study_may_name_every_focus_and_every_control() -> None:
    assert set(get_args(Focus)) == {*FOCUS, *CONTROLS}
    assert {control.mode for control in CONTROLS.values()} <= set(FOCUS)


def test_every_fault_is_reported_with_its_place_and_value(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["masks"]["min_area"] = 1.5
    content["masks"]["strategy"] = "gird"
    content["splits"]["test_fractoin"] = content["splits"].pop("test_fraction")
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="fault") as error:
        load_params(path)
    text = str(error.value)
    assert "4 fault(s)" in text
    assert "masks.min_area is 1.5: input should be less than 1" in text
    assert "masks.strategy is 'gird': input should be 'automatic', 'grid', 'center' or 'box'" in text
    assert "splits.test_fraction is missing" in text
    assert "splits.test_fractoin is not a known field" in text


def test_a_study_of_an_unknown_method_lists_the_known_ones(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["study"]["methods"]["medfocusclop"] = ["none"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"study\.methods names 'medfocusclop'.*medfocusclip"):
        load_params(path)


def test_a_missing_or_empty_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such params file; copy the project's"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ValueError, match="holds NoneType, not the sections"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("study: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")
