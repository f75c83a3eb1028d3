"""Claims about params.yaml: all faults are reported together, each with its place, value and fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flows.study.cells import plan
from flows.study.models import check_weights
from flows.study.params import Params, load_params
from flows.study.study import Study
from medfocus.clip.regions import REGIONS
from medfocus.focus.controls import CONTROLS
from medfocus.focus.modes import FOCUS

DEFAULT = Path(__file__).resolve().parents[1] / "params.yaml"


def test_the_default_params_load() -> None:
    params = load_params(DEFAULT)
    assert isinstance(params, Params)
    assert set(params.study.methods) <= set(params.methods)


def test_a_plan_accepts_exactly_the_known_focus_modes_and_controls() -> None:
    params = load_params(DEFAULT)
    known = (*FOCUS, *REGIONS, *CONTROLS)
    params = replace(params, report=replace(params.report, baseline="clip-zero-shot"))

    def with_modes(*modes: str) -> Params:
        methods = {"clip-zero-shot": ("none",), "medfocusclip": modes}
        return replace(params, study=replace(params.study, methods=methods))

    assert {cell.focus for cell in plan(with_modes(*known))} == set(known)
    with pytest.raises(ValueError, match=r"study\.methods\.medfocusclip has the focus 'crpo'; use one"):
        plan(with_modes("none", "crpo"))
    assert {control.mode for control in CONTROLS.values()} <= {*FOCUS, *REGIONS}


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
    assert "masks.strategy is 'gird': input should be 'interest', 'automatic', 'grid', 'center" in text
    assert "splits.test_fraction is missing" in text
    assert "splits.test_fractoin is not a known field" in text


def test_slices_are_optional_and_checked(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    dataset = content["datasets"]["phantom-chest"]
    path = tmp_path / "params.yaml"
    for slices, expected in ((None, (2, 1)), ({"axis": 0, "every": 5}, (0, 5))):
        if slices:
            dataset["slices"] = slices
        path.write_text(yaml.safe_dump(content))
        loaded = load_params(path).datasets["phantom-chest"].slices
        assert (loaded.axis, loaded.every) == expected
    dataset["slices"] = {"axis": 3, "every": 0}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"slices\.axis is 3: (?s:.*)slices\.every is 0: "):
        load_params(path)


def test_a_study_of_an_unknown_method_lists_the_known_ones(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["study"]["methods"]["medfocusclop"] = ["none"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"study\.methods names 'medfocusclop'.*medfocusclip"):
        load_params(path)


def test_a_missing_empty_or_invalid_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such params file\. Copy the project's"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ValueError, match="contains NoneType, not the sections"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("study: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_file_inherits_what_it_omits_from_the_file_that_it_extends(tmp_path: Path) -> None:
    base = yaml.safe_load(DEFAULT.read_text())
    (tmp_path / "w.safetensors").touch()
    base["clip"]["pretrained"] = "w.safetensors"
    write(tmp_path / "params.yaml", base)
    dataset = {**base["datasets"]["phantom-chest"], "root": "images"}
    child = write(
        tmp_path / "studies" / "mine.yaml",
        {
            "extends": "../params.yaml",
            "study": {"name": "mine", "seeds": [7]},
            "datasets": {"mine": dataset},
            "phantoms": {},
            "methods": {"lp++": {"steps": 5}, "clip-zero-shot": {}},
        },
    )
    params = load_params(child)
    assert params.study.seeds == (7,) and params.study.methods == load_params(DEFAULT).study.methods
    assert list(params.datasets) == ["mine"] and params.datasets["mine"].root == "images"
    assert params.phantoms == {}
    assert params.method("lp++") == ("lp++", {"steps": 5})
    assert params.method("pixels") == ("pixels", base["methods"]["pixels"])
    assert params.clip.pretrained == "../w.safetensors"  # relative to this file's folder
    base["clip"] |= {"model": "local-dir:weights/biomed", "pretrained": ""}
    write(tmp_path / "params.yaml", base)
    assert load_params(child).clip.model == "local-dir:../weights/biomed"
    assert load_params(child).masks.image_size is None


def test_a_row_like_another_inherits_the_settings_that_it_omits(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["methods"]["gentle"] = {"like": "clip-few-shot", "lr": 1e-5}
    params = load_params(write(tmp_path / "params.yaml", content))
    kind, settings = params.method("gentle")
    assert kind == "clip-few-shot"
    assert settings == {**content["methods"]["clip-few-shot"], "lr": 1e-5}
    content["methods"]["gentle"] = {"like": "clip-fewshot"}
    with pytest.raises(ValueError, match=r"methods\.gentle\.like is 'clip-fewshot', which is no method"):
        load_params(write(tmp_path / "params.yaml", content))


def test_a_method_may_run_on_a_part_of_the_study(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["study"]["only"] = {"medfocusclip": {"percents": [5], "shots": [], "seeds": [1]}}
    cells = plan(load_params(write(tmp_path / "params.yaml", content)))
    assert {(c.support, c.seed) for c in cells if c.method == "medfocusclip"} == {("5%", 1)}
    assert len({c.seed for c in cells if c.method == "clip-linear-probe"}) == 5
    content["study"]["only"]["medfocusclip"]["seeds"] = [1, 9]
    with pytest.raises(ValueError, match=r"only\.medfocusclip\.seeds has \[9\], which the study's seeds"):
        load_params(write(tmp_path / "params.yaml", content))
    content["study"]["only"] = {"swin": {"percents": [5], "shots": [], "seeds": [1]}}
    with pytest.raises(ValueError, match="only names 'swin', which is not among methods; they are "):
        load_params(write(tmp_path / "params.yaml", content))


def test_the_baseline_must_run_without_focus(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    content["report"]["baseline"] = "lp++"
    with pytest.raises(ValueError, match=r"report\.baseline is 'lp\+\+', which study\.methods does not run"):
        load_params(write(tmp_path / "params.yaml", content))


def test_an_invalid_scale_is_rejected(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())
    for change, message in (
        (
            {"runner": "processes", "address": "tcp://a:1"},
            r"runner is 'processes'; use dask or null",
        ),
        ({"cache": "cache"}, r"cache is 'cache'; give a URL such as s3://bucket/folder, or an absolute path"),
        (
            {"runner": "ray"},
            r"scale\.runner is 'ray': input should be 'here', 'threads', 'processes' or 'dask'",
        ),
        ({"workers": 0}, r"scale\.workers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_params(write(tmp_path / "params.yaml", {**content, "scale": {**content["scale"], **change}}))


def test_missing_weights_and_a_size_that_does_not_suit_them_show_before_any_work(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT.read_text())

    def check(**changes: dict[str, object]) -> None:
        changed = {**content, **{name: {**content[name], **change} for name, change in changes.items()}}
        check_weights(Study(tmp_path, tmp_path, load_params(write(tmp_path / "params.yaml", changed))))

    check()
    with pytest.raises(
        FileNotFoundError, match=r"CLIP pocket \(clip\.pretrained\): the file 'gone\.pt' does"
    ):
        check(clip={"pretrained": "gone.pt"})
    with pytest.raises(
        FileNotFoundError, match=r"masks\.checkpoint \(SAM2\): the file 'gone\.pt' does not exist"
    ):
        check(masks={"checkpoint": "gone.pt"})
    with pytest.warns(UserWarning, match=r"masks\.image_size is 1024, but .* pocket were trained at 256"):
        check(masks={"image_size": 1024})
    with pytest.raises(ValueError, match=r"strategy is 'interest', but .* Set masks\.strategy to grid"):
        check(masks={"config": "sam2.1_hiera_t", "checkpoint": "random:0"})
    (tmp_path / "mine.safetensors").touch()  # a path is relative to the params file
    check(clip={"pretrained": "./mine.safetensors"}, masks={"checkpoint": "./mine.safetensors"})
