"""MedFocusCLIP as a classifier for scikit-learn."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

from medfocus import MedFocusCLIP, phantoms
from medfocus.explain.explain import on_image
from medfocus.images.geometry import Frame
from medfocus.methods import METHODS
from medfocus.serving import defaults
from tests.dicoms import dicom

ROOT = Path(__file__).resolve().parents[1]
MODALITY = "breast_ultrasound"
LABELS = phantoms.MODALITIES[MODALITY]


def drawn(each: int, split: str = "train") -> tuple[list[np.ndarray], list[str]]:
    """Return ``each`` phantoms of every class, grey images of 96 px, and their labels."""
    pairs = [
        (phantoms.draw(MODALITY, label, phantoms.generator(0, MODALITY, split, label, i), 96).image, label)
        for i in range(each)
        for label in LABELS
    ]
    return [image for image, _ in pairs], [label for _, label in pairs]


def small(**changes: Any) -> MedFocusCLIP:
    """Return the paper's method with few steps and fast masks."""
    usual = {"segmenter": "otsu", "settings": {"epochs": 20}, "batch_size": 16}
    return MedFocusCLIP(**{**usual, **changes})


@pytest.fixture(scope="module")
def fitted() -> MedFocusCLIP:
    """The default classifier, with SAM2, fitted on six images per class."""
    return MedFocusCLIP(modality=MODALITY).fit(*drawn(6))


# --- the contract --------------------------------------------------------------------------------


def test_dicom_files_and_their_frames_are_images(tmp_path: Path) -> None:
    frames, labels = drawn(2)
    (tmp_path / "x.dcm").write_bytes(dicom(np.stack(frames), NumberOfFrames=len(frames)))
    paths = [Path(f"{tmp_path / 'x.dcm'}#{i}") for i in range(len(frames))]
    settings: dict[str, Any] = {"method": "nearest-class-mean", "focus": "none", "folds": 0}
    of_files = MedFocusCLIP(**settings).fit(paths, labels).predict_proba(paths)
    of_frames = MedFocusCLIP(**settings).fit(frames, labels).predict_proba(frames)
    np.testing.assert_allclose(of_files, of_frames, rtol=0, atol=1e-6)


class OnRows(MedFocusCLIP):
    """A classifier that paints each row of a table as vertical bars, for scikit-learn's own checks.

    The omitted checks test properties that images do not have: column names, a fixed number of columns,
    sparse matrices, complex and infinite numbers, one-dimensional input, array namespaces. Others test sample
    weights, a decision function and partial fits, which do not exist here.
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> OnRows:
        self.columns_ = np.asarray(X).shape[1]
        return super().fit(self._painted(X), y, groups)

    def predict_proba(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        if np.asarray(X).shape[1] != self.columns_:
            raise ValueError(f"{np.asarray(X).shape[1]} columns, and {self.columns_} in fit")
        return super().predict_proba(self._painted(X))

    def _painted(self, X: Any) -> list[np.ndarray]:
        values = np.clip(128 + 20 * np.asarray(X, dtype=float), 0, 255).astype(np.uint8)  # (N, F)
        wide = np.repeat(values, max(1, 24 // values.shape[1]), axis=1)
        return list(np.repeat(wide[:, None], 24, axis=1))


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_fit_score_takes_y",
        "check_estimators_fit_returns_self",
        "check_estimators_overwrite_params",
        "check_dont_overwrite_parameters",
        "check_estimators_unfitted",
        "check_fit_check_is_fitted",
        "check_fit_idempotent",
        "check_dict_unchanged",
        "check_estimators_pickle",
        "check_readonly_memmap_input",
        "check_f_contiguous_array_estimator",
        "check_estimators_dtypes",
        "check_pipeline_consistency",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_classifiers_classes",
        "check_classifiers_one_label",
        "check_classifiers_train",
        "check_classifiers_regression_target",
        "check_classifier_data_not_an_array",
        "check_supervised_y_no_nan",
        "check_supervised_y_2d",
        "check_requires_y_none",
        "check_fit2d_1sample",
    ],
)
def test_it_passes_the_checks_of_scikit_learn(check: str) -> None:
    getattr(estimator_checks, check)("OnRows", OnRows(method="pixels", focus="none", batch_size=8))


def test_its_tags_say_that_it_accepts_images_instead_of_tables() -> None:
    tags = MedFocusCLIP().__sklearn_tags__()
    assert not tags.input_tags.two_d_array
    assert tags.estimator_type == "classifier"


def test_a_clone_has_the_parameters_and_nothing_learned(fitted: MedFocusCLIP) -> None:
    copy = cast("MedFocusCLIP", clone(fitted))
    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(drawn(1)[0])


def test_every_parameter_can_be_set_and_read() -> None:
    changes = {"method": "lp++", "focus": "none", "settings": {"steps": 3}, "random_state": 7, "flip": True}
    assert MedFocusCLIP().set_params(**changes).get_params() == {**MedFocusCLIP().get_params(), **changes}


# --- fitting and predicting ----------------------------------------------------------------------


def test_it_classifies_phantoms_that_it_has_not_seen(fitted: MedFocusCLIP) -> None:
    images, labels = drawn(12, "test")
    probabilities = fitted.predict_proba(images)
    assert probabilities.shape == (36, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert list(fitted.classes_) == sorted(LABELS)
    assert np.array_equal(fitted.predict(images), fitted.classes_[probabilities.argmax(1)])
    assert fitted.score(images, labels) > 0.5  # chance is a third


def test_its_sets_contain_the_predicted_class(fitted: MedFocusCLIP) -> None:
    images, labels = drawn(6, "test")
    sets, truth = fitted.predict_set(images), np.searchsorted(fitted.classes_, labels)
    predicted = fitted.predict_proba(images).argmax(axis=1)
    assert sets.shape == (18, 3) and sets[np.arange(18), predicted].all()
    assert sets[np.arange(18), truth].mean() >= (predicted == truth).mean()
    assert fitted.calibration_.images == 18 and fitted.calibration_.temperature != 1


def test_the_temperature_changes_probabilities_but_no_prediction() -> None:
    images, labels = drawn(4)
    calibrated, plain = (
        small(method="clip-linear-probe", settings=None, folds=folds).fit(images, labels) for folds in (2, 0)
    )
    assert plain.calibration_.temperature == 1 and calibrated.calibration_.temperature != 1
    assert np.array_equal(calibrated.predict(images), plain.predict(images))
    assert np.abs(calibrated.predict_proba(images) - plain.predict_proba(images)).max() > 1e-4


def test_too_few_images_for_the_promise_give_no_set() -> None:
    images, labels = drawn(2)
    with pytest.raises(
        ValueError, match=r"6 labelled images cannot support a 90 % promise; 9 are needed\. Give"
    ):
        small(method="pixels", focus="none", settings=None).fit(images, labels).predict_set(images)


def test_a_method_that_runs_an_encoder_is_calibrated_only_on_request() -> None:
    images, labels = drawn(2)
    usual: dict[str, Any] = {"method": "clip-few-shot", "focus": "none", "settings": {"epochs": 1}}
    assert small(**usual).fit(images, labels).calibration_.images == 0
    assert small(**usual, folds=2).fit(images, labels).calibration_.images == 6


def test_cross_validation_keeps_masks_in_the_cache_folder(tmp_path: Path) -> None:
    images, labels = drawn(12)
    scores = cross_val_score(small(cache=tmp_path / "masks"), images, labels, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.4
    assert any((tmp_path / "masks").rglob("*"))


def test_it_is_the_last_step_of_a_pipeline() -> None:
    images, labels = drawn(3)
    upright = make_pipeline(FunctionTransformer(lambda X: [np.rot90(p).copy() for p in X]), small())
    turned = [np.rot90(image, -1).copy() for image in images]
    probabilities = upright.fit(turned, labels).predict_proba(turned)
    np.testing.assert_array_equal(probabilities, small().fit(images, labels).predict_proba(images))


def test_the_same_random_state_gives_the_same_classifier_and_another_does_not() -> None:
    images, labels = drawn(3)
    first, again, other = (
        small(random_state=seed).fit(images, labels).predict_proba(images) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-6


def test_labels_may_be_numbers_with_class_names() -> None:
    images, labels = drawn(2)
    numbers = [LABELS.index(label) for label in labels]
    words = {str(i): label for i, label in enumerate(LABELS)}
    model = small(method="clip-zero-shot", settings=None, names=words).fit(images, numbers)
    assert model.predict(images).dtype == np.asarray(numbers).dtype
    named = small(method="clip-zero-shot", settings=None).fit(images, labels)
    order = [list(named.classes_).index(label) for label in LABELS]
    np.testing.assert_allclose(model.predict_proba(images), named.predict_proba(images)[:, order])


def test_grey_colour_and_file_of_one_image_give_the_same_prediction(
    fitted: MedFocusCLIP, tmp_path: Path
) -> None:
    image = drawn(1)[0][0]
    Image.fromarray(image).save(tmp_path / "image.png")
    colour = np.repeat(image[:, :, None], 3, axis=2)
    grey, rgb, file = fitted.predict_proba([image, colour, tmp_path / "image.png"])
    np.testing.assert_array_equal(grey, rgb)
    np.testing.assert_allclose(grey, file, atol=1e-6)


def test_a_fitted_classifier_is_pickled_without_clip(fitted: MedFocusCLIP) -> None:
    images = drawn(1)[0]
    data = pickle.dumps(fitted)
    assert len(data) < 1_000_000
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(images), fitted.predict_proba(images))


def test_a_saved_classifier_loads_with_the_same_predictions(fitted: MedFocusCLIP, tmp_path: Path) -> None:
    images = drawn(2)[0]
    fitted.save(tmp_path / "model")
    loaded = MedFocusCLIP.load(tmp_path / "model")
    assert loaded.get_params() == fitted.get_params()
    np.testing.assert_allclose(loaded.predict_proba(images), fitted.predict_proba(images), atol=1e-6)
    np.testing.assert_array_equal(loaded.predict_set(images), fitted.predict_set(images))
    (tmp_path / "model" / "estimator.json").unlink()
    with pytest.raises(FileNotFoundError, match="Give a folder that "):
        MedFocusCLIP.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "changes", "segmenter"),
    [
        ("medfocusclip", {}, "otsu"),
        ("medfocusclip", {"segmenter_grid": 2, "layers": [1]}, "sam2"),  # with SAM2's features
        ("clip-adapter", {"lr": [0.0001, 0.01], "epochs": 20}, "otsu"),  # selects a learning rate
    ],
)
def test_it_gives_the_numbers_of_a_study_with_the_same_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], segmenter: str
) -> None:
    from flows.stages import duplicates, finetune, ingest, masks, scoring, splits
    from flows.study import cells, models, study
    from flows.study import dataset as datasets

    data = "phantom-breast"
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["datasets"] = {data: content["datasets"][data]}
    content["phantoms"] = {}
    content["study"] |= {"methods": {name: ["none", "crop"]}, "percents": [100], "seeds": [3]}
    content["methods"][name]["small"] = content["methods"][name].get("small", {}) | changes
    content["masks"] |= {"segmenter": segmenter}
    content["report"] |= {"baseline": name}
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    root = Path(content["datasets"][data]["root"])
    phantoms.write(root, MODALITY, seed=0, train_per_class=4, test_per_class=2, size=96)
    for stage in (ingest, duplicates, splits, masks):
        stage.main(["--dataset", data])

    opened = study.here()
    dataset = datasets.EncodedDataset(opened, data, models.build_encoder(opened))
    cell = cells.Cell(data, name, "crop", "100%", 3)
    paths, test = dataset.support_paths(cell), dataset.splits.test
    dataset.embed([name], "crop", paths, dataset.views(cell), "train")
    dataset.embed([name], "crop", test, 1, "test")
    monkeypatch.setattr(finetune, "_end_with_parent", lambda: None)  # no worker here
    finetune.fit(finetune.prepare(dataset, cell, tmp_path / "cell.safetensors"))
    logits, header, _ = scoring.predict(dataset, cell, tmp_path / "cell.safetensors")

    settings = defaults.method_settings(name, "small") | changes
    model = MedFocusCLIP(
        method=name, settings=settings, segmenter=segmenter, modality=MODALITY, flip=True, random_state=3
    )
    model.fit(
        [root / path for path in paths],
        [dataset.records[path].label for path in paths],
        groups=[dataset.splits.groups[path] for path in paths],
    )
    predicted = model.predict_proba([root / path for path in test])
    expected = header.calibration.probabilities(next(iter(logits.values())))
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    assert model.calibration_.temperature == pytest.approx(header.calibration.temperature, rel=1e-4)
    assert model.calibration_.images == header.calibration.images == header.validation_count == 12
    if "lr" in changes:
        chosen = header.settings["lr"]
        assert chosen in changes["lr"] and cast("Any", model.method_).lr == chosen


# --- explaining ----------------------------------------------------------------------------------


def test_an_explanation_has_mask_focus_and_attribution_on_the_image(fitted: MedFocusCLIP) -> None:
    image = drawn(1)[0][0]
    explanation = fitted.explain(image)
    assert explanation.label == fitted.predict([image])[0]
    assert (explanation.mask.shape, explanation.mask.dtype) == (image.shape, np.dtype(bool))
    assert explanation.focus.shape == (fitted.encoder_.image_size,) * 2 + (3,)
    assert explanation.attribution.shape == image.shape
    assert explanation.attribution.sum() == pytest.approx(1, abs=1e-4)
    other = fitted.explain(image, label=next(c for c in fitted.classes_ if c != explanation.label))
    assert np.abs(other.attribution - explanation.attribution).max() > 0


def test_an_explanation_without_a_focus_still_has_a_mask() -> None:
    images, labels = drawn(2)
    explanation = (
        small(method="clip-linear-probe", focus="none", settings=None).fit(images, labels).explain(images[0])
    )
    assert 0 < explanation.mask.mean() < 1


def test_the_area_outside_of_a_crop_has_no_attribution() -> None:
    mask = np.zeros((60, 100), bool)
    mask[5:15, 10:20] = True  # the crop is 40 x 40 around (10, 15), cut at the image's border
    heat = np.full((32, 32), 1 / 32**2, np.float32)
    placed = on_image(heat, mask, "crop", Frame(32))
    assert placed[:30, :35].min() > 0
    assert placed[30:].max() == placed[:, 35:].max() == 0
    assert placed.sum() == pytest.approx(1, abs=1e-4)


def test_attribution_maps_from_the_view_back_to_the_image() -> None:
    heat = np.zeros((32, 32), np.float32)
    heat[16, 24] = 1  # the view of a wide image has bars above and below
    placed = on_image(heat, np.ones((50, 100), bool), "multiply", Frame(32))
    assert np.unravel_index(placed.argmax(), placed.shape) == pytest.approx((26, 76), abs=2)


# --- refusing ------------------------------------------------------------------------------------


IMAGE = np.zeros((80, 80), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        ([IMAGE, IMAGE], [0, 0], "y has 1 class"),
        ([IMAGE, IMAGE], [0, 1, 1], "inconsistent numbers of samples"),
        ([IMAGE, IMAGE[0]], [0, 1], r"X\[1\] is uint8 of shape \(80,\), but an image is uint8 of \(H, W\)"),
        ([IMAGE / 255, IMAGE], [0, 1], r"X\[0\] is float64 .* Scale the values to 0 to 255"),
        ([IMAGE, None], [0, 1], r"X\[1\] is of type NoneType. Give an array of uint8 or a path"),
        (np.zeros((80, 80, 3), np.uint8), [0, 1], r"for a single image, \[image\]"),
        ("image.png", [0, 1], "Give a list of images"),
        (7, [0, 1], "X is of type int. Give a list of images"),
        ([], [], "X has 0 images"),
        ([IMAGE, IMAGE], [0.1, 0.7], "Unknown label type"),
    ],
)
def test_faulty_images_and_labels_are_refused(images: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small().fit(images, labels)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "med"}, "method is 'med'; use one of pixels, "),
        ({"focus": "zoom"}, "focus is 'zoom'; use one of none, "),
        ({"segmenter": "unet"}, "segmenter is 'unet'; use one of otsu, sam2"),
        ({"augmented": -1}, "augmented is -1; use 0 or more"),
        ({"folds": -1}, "folds is -1; use 0 or more"),
        ({"confidence": 1.0}, r"confidence is 1\.0; use 0\.5 or more, and less than 1"),
        (
            {"settings": {"epoch": 3}},
            "settings has 'epoch', which medfocusclip does not have. It has tuning",
        ),
        ({"settings": {"segmenter_grid": 2}}, "needs SAM2's features"),
        ({"modality": "x-ray"}, "modality 'x-ray' has no text prompts"),
    ],
)
def test_fit_names_a_wrong_parameter_with_the_known_values(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**changes).fit(*drawn(1))


def test_an_unknown_label_cannot_be_explained(fitted: MedFocusCLIP) -> None:
    with pytest.raises(ValueError, match=r"'healthy' is not one of the classes\. Give one of benign, "):
        fitted.explain(IMAGE, label="healthy")


# --- the numbers and the examples ----------------------------------------------------------------


def test_the_default_numbers_are_those_of_the_embedded_study() -> None:
    params = defaults.default_params()
    assert params == yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert METHODS.keys() <= params["methods"].keys()
    of_views = {name: MedFocusCLIP().get_params()[name] for name in params["views"]}
    assert of_views == params["views"]
    assert MedFocusCLIP().confidence == params["validation"]["confidence"]
