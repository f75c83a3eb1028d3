"""A model folder, a registered model, and predictions in a fresh process and by a server."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.pyfunc.model import PythonModelContext
from PIL import Image

from benchmarks.serving import model_server
from flows.servers.processes import free_port
from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.learning.calibration import Calibration
from medfocus.learning.method import Support
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import OtsuSettings, Sam2Settings
from medfocus.masks.store import decode_mask, encode_mask
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.serving import checkpoint, pyfunc
from medfocus.serving.model_folder import load_model, save_model
from medfocus.serving.predictor import BATCH, Prediction, Predictor
from medfocus.serving.pyfunc import FocusClassifier, ServedError
from medfocus.tracking import registry, runs
from medfocus.tracking.process import QUIET

pytestmark = [
    # On import MLflow silences this in a way that "error" overrules.
    pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning"),
    # MLflow compares a pandas index with a range when it saves an input example.
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),
]

CLASSES = ("blob", "stripes")
PATIENT = "DOE_JANE_1970"
CALIBRATION = Calibration(temperature=2.0, threshold=0.45, confidence=0.9, images=12)
SEGMENTER = Sam2Settings("pocket", "random:0", 128, "grid", points_per_side=3)
FEATHER = 0.01


def encoded(seed: int) -> bytes:
    """A PNG of one of the two classes: even seeds a bright blob, odd seeds stripes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:90, :110]
    inside = (y - 40 - 10 * rng.random()) ** 2 + (x - 50 - 10 * rng.random()) ** 2 < 400
    signal = np.where(inside, 200, 60) if seed % 2 == 0 else 100 + 80 * np.sin(x / 3 + rng.random())
    grey = np.clip(signal + rng.normal(0, 10, signal.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Fitted:
    """A cell after fine-tuning."""

    encoder: ClipEncoder
    segmenter: Sam2Segmenter
    method: MedFocusClip
    checkpoint: Path

    def evaluated(self, images: list[bytes]) -> np.ndarray:
        """Return probabilities (N, K) by the steps of the evaluation: masks, views, features, temperature."""
        decoded = [decode.decode(data, "a test image") for data in images]
        stored = [decode_mask(encode_mask(self.segmenter.segment([image])[0])) for image in decoded]

        def make_view(i: int) -> np.ndarray:
            region, frame = stored[i].region, self.encoder.frame
            return view(decoded[i], region, focus="multiply", frame=frame, feather=FEATHER)

        inputs = features.encode(
            range(len(decoded)), [str(i) for i in range(len(decoded))], make_view, self.method.embed,
            cache=None, settings="", batch_size=4,
        )  # fmt: skip
        return CALIBRATION.probabilities(self.method.logits(inputs)["probe"].double().numpy())

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write the model folder with changes."""
        usual: dict[str, Any] = {
            "checkpoint": self.checkpoint, "encoder": self.encoder, "segmenter": self.segmenter,
            "feather": FEATHER, "fill": "mean",
        }  # fmt: skip
        save_model(folder, **{**usual, **changes})
        return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """MedFocusCLIP on eight images, with pocket-size CLIP and SAM2 of random weights."""
    encoder = build_clip("pocket", "random:0")
    segmenter = load_sam2(SEGMENTER)
    method = MedFocusClip(
        encoder, tuning="adapter", lora_rank=2, lora_alpha=1.0, lora_dropout=0.25,
        fusion="softmax-text", head="cosine", contrastive_weights=(0.5,),
        blocks=0, layers=(), grid=2, segmenter_grid=0, hidden=8, epochs=5, max_steps=99, batch_size=8,
        lr=1e-3, weight_decay=0.01, folds=2, text_prior=True, augmented=None, warmup=0, smoothing=0,
    )  # fmt: skip
    images = [decode.decode(encoded(seed), "a training image") for seed in range(8)]
    masks = segmenter.segment(images)
    views = [
        view(p, m.region, focus="multiply", frame=encoder.frame, feather=FEATHER)
        for p, m in zip(images, masks, strict=True)
    ]
    inputs = method.embed(torch.from_numpy(np.stack(views)))  # (N, D)
    text = encoder.encode_texts([f"a photo of {name}" for name in CLASSES])
    support = Support(inputs[None], torch.tensor([0, 1] * 4), torch.arange(8), text)
    method.fit(support, torch.Generator().manual_seed(0))
    header = checkpoint.Header(
        method="medfocusclip",
        settings={
            "tuning": "adapter", "lora_rank": 2, "lora_alpha": 1.0, "lora_dropout": 0.25,
            "fusion": "softmax-text", "head": "cosine", "contrastive_weights": [0.5],
            "blocks": 0, "layers": [], "grid": 2, "segmenter_grid": 0, "hidden": 8,
            "epochs": 5, "max_steps": 99, "batch_size": 8,
            "lr": 1e-3, "weight_decay": 0.01, "folds": 2, "text_prior": True,
            "augmented": None, "warmup": 0, "smoothing": 0,
        },
        classes=CLASSES, focus="multiply", encoder_key=encoder.key, validation_correct=0, validation_count=0,
        facts={}, calibration=CALIBRATION,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoints") / "cell.safetensors"
    checkpoint.save(method, header, path)
    return Fitted(encoder, segmenter, method, path)


@pytest.fixture(scope="module")
def model(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model folder."""
    return fitted.save(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    """The model, loaded from its folder alone."""
    return load_model(model)


def test_the_served_probabilities_are_those_of_the_evaluation(fitted: Fitted, predictor: Predictor) -> None:
    images = [encoded(seed) for seed in range(20, 26)]
    served = np.array([list(p.probabilities.values()) for p in predictor.predict(images)])
    np.testing.assert_allclose(served, fitted.evaluated(images), atol=1e-6)
    assert np.ptp(served[:, 0]) > 0.01  # the images differ


def test_a_set_has_the_classes_that_reach_the_threshold(predictor: Predictor) -> None:
    sets = predictor.sets(np.array([[0.9, 0.1], [0.46, 0.54]]))
    assert sets == [("blob",), ("blob", "stripes")]
    for each in predictor.predict([encoded(seed) for seed in range(20, 26)], overlay=False):
        reached = [name for name, p in each.probabilities.items() if p >= 0.45]
        assert list(each.set) == reached and each.label in each.set


def test_a_prediction_is_complete(predictor: Predictor) -> None:
    data = encoded(20)
    [prediction] = predictor.predict([data])
    image = decode.decode(data, "it")
    assert tuple(prediction.probabilities) == CLASSES
    assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert prediction.label == max(CLASSES, key=lambda name: prediction.probabilities[name])
    assert (prediction.mask.shape, prediction.mask.dtype) == ((90, 110), np.dtype(bool))
    assert prediction.mask_status in ("chosen", "relaxed", "box", "identity")
    overlay = decode.decode(prediction.overlay, "the overlay")
    assert np.array_equal((overlay != image).any(axis=2), prediction.mask)


def test_a_prediction_does_not_depend_on_the_other_images_of_the_request(predictor: Predictor) -> None:
    images = [encoded(seed) for seed in range(BATCH + 3)]
    together = [list(p.probabilities.values()) for p in predictor.predict(images)]
    alone = [list(predictor.predict([data])[0].probabilities.values()) for data in images]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_an_empty_request_has_an_empty_answer(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"", "the file is empty"),
        (b"no image", "is not in a supported image format"),
        (encoded(0)[:300], "cannot be decoded"),
    ],
)
def test_the_error_for_a_faulty_image_has_its_place_the_fault_and_the_fix(
    predictor: Predictor, bad: bytes, fault: str
) -> None:
    with pytest.raises(ValueError, match=rf"image 2 of 3: {fault}.*\. .+"):
        predictor.predict([encoded(0), bad, encoded(1)])


def test_the_model_folder_contains_only_tensors_and_text(model: Path) -> None:
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert names == {
        "cell.safetensors", "clip/open_clip_model.safetensors", "clip/open_clip_config.json",
        "sam2.safetensors", "sam2.yaml", "serve.json",
    }  # fmt: skip
    content = json.loads((model / "serve.json").read_text())
    assert (content["classes"], content["focus"], content["clip"]) == (list(CLASSES), "multiply", "pocket")
    assert content["versions"]["torch"].startswith("2.")


def test_the_rebuilt_segmenter_is_that_of_the_training(fitted: Fitted, predictor: Predictor) -> None:
    assert predictor.segmenter.key == fitted.segmenter.key


def test_the_rebuilt_clip_has_the_same_weights_and_no_tokenizer(fitted: Fitted, predictor: Predictor) -> None:
    from medfocus.storage.weights import digest

    rebuilt = predictor.method.encoder
    assert digest(rebuilt.model.state_dict()) == digest(fitted.encoder.model.state_dict())
    assert (rebuilt.key, rebuilt.mean, rebuilt.logit_scale) == (
        fitted.encoder.key,
        fitted.encoder.mean,
        fitted.encoder.logit_scale,
    )
    assert rebuilt.tokenizer is None


def test_saving_again_replaces_the_folder_and_leaves_no_temporary_folder(
    fitted: Fitted, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "model")
    (tmp_path / "model" / "stale").write_text("")
    fitted.save(tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_no_model_is_never_replaced(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"exists and holds no model, so it is not replaced. Give a new"
    ):
        fitted.save(Path())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_with_otsu_masks_is_served(fitted: Fitted, tmp_path: Path) -> None:
    otsu = OtsuSegmenter(OtsuSettings(min_area=0.02))
    folder = fitted.save(tmp_path / "model", segmenter=otsu)
    [prediction] = load_model(folder).predict([encoded(0)])
    assert np.array_equal(prediction.mask, otsu.segment([decode.decode(encoded(0), "it")])[0].region)
    assert not (folder / "sam2.safetensors").exists()


def test_the_loaded_segmenter_is_the_saved_segmenter(fitted: Fitted, tmp_path: Path) -> None:
    loaded = load_model(fitted.save(tmp_path / "model")).segmenter
    assert loaded.key == fitted.segmenter.key


def test_another_clip_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was fitted on CLIP weights .*Give the encoder that"):
        fitted.save(tmp_path / "model", encoder=replace(fitted.encoder, key="f" * 64))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"serve.json is missing"):
        load_model(tmp_path)


class Touch:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("python_model.pkl", r"python_model\.pkl: a \.pkl file can run code when it is opened"),
        ("clip/open_clip_pytorch_model.bin", r"open_clip_pytorch_model\.bin: a \.bin file can run code"),
        ("cell.safetensors", "cell.safetensors is not a MedFocusCLIP checkpoint"),
        ("sam2.safetensors", "sam2.safetensors: is not a complete safetensors file"),
        (
            "clip/open_clip_model.safetensors",
            "open_clip_model.safetensors: is not a complete safetensors file",
        ),
    ],
)
def test_a_model_folder_with_a_pickle_under_any_name_is_refused_before_its_code_runs(
    model: Path, tmp_path: Path, name: str, fault: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / name).write_bytes(pickle.dumps({"w": Touch(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=fault):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_folder_builds_only_sam2(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    text = (folder / "sam2.yaml").read_text()
    call = f"{{_target_: os.system, command: touch {tmp_path / 'ran'}}}"
    (folder / "sam2.yaml").write_text(f"{text}  extra: {call}\n")
    with pytest.raises(ValueError, match=r"asks to build 'os\.system', which is no module of sam2\.modeling"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_the_activation_and_normalisation_of_a_pretrained_tag_are_kept(
    fitted: Fitted, tmp_path: Path
) -> None:
    """A tag can have QuickGELU and other means than its architecture; the model folder has both."""
    import open_clip

    from medfocus.clip.build import built_config

    quick = open_clip.create_model(
        "clip_pocket", force_quick_gelu=True, force_preprocess_cfg={"mean": (0.5, 0.5, 0.5)}
    ).eval()
    visual: Any = quick.visual
    as_built = built_config(fitted.encoder.config["model_cfg"], quick)
    assert as_built["quick_gelu"]
    encoder = replace(
        fitted.encoder,
        model=quick.requires_grad_(False),
        mean=(0.5, 0.5, 0.5),
        config={"model_cfg": as_built, "preprocess_cfg": dict(visual.preprocess_cfg)},
    )
    folder = fitted.save(tmp_path / "model", encoder=encoder)
    rebuilt = load_model(folder).method.encoder
    pixels = encoder.preprocess(torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8))
    assert rebuilt.mean == (0.5, 0.5, 0.5)
    torch.testing.assert_close(rebuilt.encode_images(pixels), encoder.encode_images(pixels))
    assert not torch.allclose(fitted.encoder.encode_images(pixels), rebuilt.encode_images(pixels), atol=1e-3)


# Runs far from the source tree; prints what a client would get.
_CLIENT = """
import base64, json, sys
import mlflow
import pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/phantoms@champion")
images = [base64.b64decode(text) for text in json.load(sys.stdin)]
answers = model.predict(pd.DataFrame({"image": images}))
texts = model.predict([{"image": base64.b64encode(data).decode()} for data in images])
try:
    model.predict(pd.DataFrame({"image": [images[0], "not base64!"]}))
except ValueError as error:
    fault = str(error)
import medfocus
print(json.dumps({
    "columns": list(answers.columns),
    "sets": answers["set"].tolist(),
    "probabilities": answers[["probability_blob", "probability_stripes"]].values.tolist(),
    "same": answers.equals(texts),
    "overlay": answers["overlay"][0],
    "signature": [model.metadata.signature.inputs.to_dict(), model.metadata.signature.outputs.input_names()],
    "example": len(model.input_example),
    "fault": fault,
    "package": medfocus.__file__,
}))
"""


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry that has the model as champion."""
    home = tmp_path_factory.mktemp("registry") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registered = registry.register(
            runs.start(None, home, "serving"), "phantoms", lambda folder: shutil.copytree(model, folder),
            cell_key="k", judge=lambda champion: registry.Verdict(True, "promoted", {}),
            classes=CLASSES, example=encoded(0), tags={},
        )  # fmt: skip
    assert registered.alias == "champion"
    return home


def test_a_fresh_process_loads_the_champion_and_predicts_from_raw_bytes(
    fitted: Fitted, predictor: Predictor, home: Path, tmp_path: Path
) -> None:
    images = [encoded(seed) for seed in (30, 31, 32)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | QUIET
    result = subprocess.run(
        [sys.executable, "-c", _CLIENT, f"sqlite:///{home / 'mlflow.db'}"],
        input=json.dumps([base64.b64encode(data).decode() for data in images]),
        capture_output=True, text=True, cwd=elsewhere, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    columns = [
        "label",
        "probability_blob",
        "probability_stripes",
        "set",
        "mask_status",
        "mask_score",
        "overlay",
    ]
    assert answer["columns"] == columns
    assert answer["sets"] == [list(each.set) for each in predictor.predict(images)]
    assert answer["signature"][0] == [{"type": "string", "name": "image", "required": False}]
    assert answer["signature"][1] == [*columns[:4], "no_set", *columns[4:]]
    assert answer["example"] == 1  # and the batch has three
    np.testing.assert_allclose(answer["probabilities"], fitted.evaluated(images), atol=1e-6)
    assert answer["same"]
    assert decode.decode(base64.b64decode(answer["overlay"]), "overlay").shape == (90, 110, 3)
    assert answer["fault"].startswith("image 2 of 2: is not base64")
    assert Path(answer["package"]).is_relative_to(home / "mlruns")  # the model contains its code


@dataclass(frozen=True)
class Served:
    """A scoring server of MLflow, and its log file."""

    address: str
    log: Path

    def post(self, body: object) -> tuple[int, Any]:
        """Return the status and the content of the answer to a request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(f"{self.address}/invocations", data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def served(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`mlflow models serve` on loopback with the champion, in a process that ends after the tests."""
    log = tmp_path_factory.mktemp("server") / "log"
    store = f"sqlite:///{home / 'mlflow.db'}"
    with model_server(store, "models:/phantoms@champion", free_port(), log) as address:
        yield Served(address, log)


def base64_of(*seeds: int) -> list[str]:
    return [base64.b64encode(encoded(seed)).decode() for seed in seeds]


FORMS: dict[str, Any] = {
    "dataframe_split": lambda texts: {"columns": ["image"], "data": [[text] for text in texts]},
    "dataframe_records": lambda texts: [{"image": text} for text in texts],
    "inputs": lambda texts: {"image": texts},
    "instances": lambda texts: [{"image": text} for text in texts],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_json_form_of_mlflow_gets_the_evaluations_answers(
    fitted: Fitted, served: Served, form: str
) -> None:
    status, answer = served.post({form: FORMS[form](base64_of(30, 31, 32))})
    assert status == 200
    rows = [[row["probability_blob"], row["probability_stripes"]] for row in answer["predictions"]]
    np.testing.assert_allclose(rows, fitted.evaluated([encoded(s) for s in (30, 31, 32)]), atol=1e-6)
    overlay = base64.b64decode(answer["predictions"][2]["overlay"])
    assert decode.decode(overlay, "overlay").shape == (90, 110, 3)


@pytest.mark.parametrize("form", ["inputs", "instances"])
def test_a_bare_list_is_read_as_images(served: Served, form: str) -> None:
    texts = base64_of(30, 31)
    assert served.post({form: texts}) == served.post({"dataframe_records": FORMS["instances"](texts)})


def test_a_request_can_omit_overlays(served: Served) -> None:
    request = {"dataframe_records": FORMS["instances"](base64_of(30, 31))}
    _, whole = served.post(request)
    status, lean = served.post({**request, "params": {"overlay": False}})
    assert status == 200
    assert lean["predictions"] == [
        {name: value for name, value in row.items() if name != "overlay"} for row in whole["predictions"]
    ]


def large() -> str:
    """81 megapixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


NOT_BASE64 = r"image 1 of 1: is not base64 \(.+\)\. Encode the file's bytes\."


@pytest.mark.parametrize(
    ("values", "status", "message"),
    [
        (["not base64!"], 400, NOT_BASE64),
        (["ü"], 400, NOT_BASE64),
        ([*base64_of(0), 3], 400, r"image 2 of 2: has type int\. Send a file's bytes, or their base64.+"),
        ([*base64_of(0), None], 400, r"image 2 of 2: has type .+\. Send a file's bytes.+"),
        ([["a list"]], 400, r"image 1 of 1: has type list\. Send a file's bytes.+"),
        ([""], 400, r"image 1 of 1: the file is empty \(0 bytes\)\. .+"),
        (["aGVsbG8="], 400, r"image 1 of 1: is not in a supported image format .+\. Export it again.+"),
        ([base64_of(0)[0][:400]], 400, r"image 1 of 1: cannot be decoded .+\. Export it again.+"),
        (
            [large()],
            413,
            r"image 1 of 1: has 9000 x 9000 pixels; the limit .+\. Scale it down.+",
        ),
        ([], 400, r"the request has no image\. Send at least one in the column 'image'\."),
        (
            ["aGVsbG8="] * 65,
            413,
            r"the request has 65 images, and the limit is 64\. Send several.+",
        ),
    ],
)
def test_the_answer_to_a_faulty_image_has_place_fault_and_fix_alone(
    served: Served, values: list[object], status: int, message: str
) -> None:
    rows = [[value, f"{PATIENT}.png"] for value in values]
    names = [f"{PATIENT}/{i}" for i in range(len(rows))]
    request = {"columns": ["image", "file"], "data": rows, "index": names}
    answered, answer = served.post({"dataframe_split": request})
    assert (answered, set(answer)) == (status, {"error_code", "message"})
    assert re.fullmatch(message, answer["message"])
    assert PATIENT not in served.log.read_text()


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_records": []},
        {"dataframe_records": [{"scan": "aGVsbG8="}]},
        {"dataframe_split": {"data": [["aGVsbG8="]]}},
        {"inputs": {}},
        {"inputs": 3},
        {"prompt": "aGVsbG8="},
    ],
)
def test_the_answer_to_a_request_without_the_column_names_it(served: Served, body: object) -> None:
    fault = "the request has no column 'image'. Send the images in this column, each in base64."
    assert served.post(body) == (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": fault})


@pytest.mark.parametrize(
    "body",
    [
        b"{no json",
        [1],
        {},
        {"inputs": ["aGVsbG8="], "instances": ["aGVsbG8="]},
        {"dataframe_records": {"image": "aGVsbG8="}},
        {"inputs": ["aGVsbG8="], "params": {"overlay": "no"}},
    ],
)
def test_a_request_that_mlflow_refuses_gets_status_400_without_a_stack_trace(
    served: Served, body: object
) -> None:
    status, answer = served.post(body)
    assert status == 400
    assert "stack_trace" not in answer and answer["message"]


def test_concurrent_requests_get_the_same_answers_as_serial_requests(served: Served) -> None:
    requests = [{"inputs": base64_of(*range(seed, seed + 1 + seed % 3))} for seed in range(40, 52)]
    serial = [served.post(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(served.post, requests)) == serial
    assert {status for status, _ in serial} == {200}
    assert len({repr(answer) for _, answer in serial}) == len(requests)


@pytest.mark.parametrize(("path", "start"), [("ping", b""), ("health", b""), ("version", b"3.")])
def test_the_server_reports_its_state(served: Served, path: str, start: bytes) -> None:
    with urlopen(f"{served.address}/{path}", timeout=10) as response:
        assert response.status == 200
        assert response.read().strip().startswith(start)


class Alone:
    """A predictor without sets that fails if two threads enter it."""

    calibration = Calibration(images=6)

    def __init__(self) -> None:
        self.inside = 0

    def predict(self, images: list[bytes], overlay: bool) -> list[Prediction]:
        self.inside += 1
        time.sleep(0.01)
        assert self.inside == 1
        self.inside -= 1
        return [Prediction("blob", {}, np.zeros((1, 1), bool), "chosen", 0.5, b"") for _ in images]


class Broken:
    """A predictor that fails."""

    def predict(self, images: list[bytes], overlay: bool) -> list[Prediction]:
        raise OSError(f"/data/{PATIENT}/cell.safetensors: no space left on device")


def answered(predictor: Any, values: list[Any]) -> pd.DataFrame:
    """Return the answer of the registered model's code with another predictor."""
    model = FocusClassifier()
    model.predictor, model.one_at_a_time = predictor, threading.Lock()
    return model.predict(PythonModelContext({}, {}), pd.DataFrame({"image": values}))


def test_one_thread_predicts_at_a_time() -> None:
    model = FocusClassifier()
    model.predictor, model.one_at_a_time = cast("Predictor", Alone()), threading.Lock()
    frame = pd.DataFrame({"image": [b"x"]})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: model.predict(PythonModelContext({}, {}), frame), range(16)))
    assert [answer["label"].tolist() for answer in answers] == [["blob"]] * 16


def test_a_model_without_sets_says_why_in_place_of_a_set() -> None:
    answer = answered(Alone(), [b"x", b"y"])
    assert "set" not in answer
    assert answer["no_set"].tolist() == [Calibration(images=6).no_set] * 2


def test_an_internal_fault_is_status_500_with_kind_and_place_and_its_text_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ServedError) as raised:
        answered(Broken(), [b"x"])
    raised.value.message = "Failed to predict data 'what was sent'"  # as the scoring server does
    answer = json.loads(raised.value.serialize_as_json())
    assert raised.value.get_http_status_code() == 500
    assert set(answer) == {"error_code", "message"}
    assert answer["error_code"] == "INTERNAL_ERROR"
    fault = r"the prediction failed in the server \(OSError at \S+:\d+\)\. Read the .+ log\."
    assert re.fullmatch(fault, answer["message"])
    assert "no space left on device" in caplog.text


def test_a_served_request_is_bounded_in_bytes_and_a_call_in_the_same_process_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(answered(Alone(), [b"x"] * 65)) == 65
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setattr(pyfunc, "MOST_BYTES", 2_000_000)
    fault = r"images have 3 MB, and the limit is 2\. Send several requests\."
    with pytest.raises(ServedError, match=fault) as raised:
        answered(Alone(), ["A" * 1_000_000] * 4)
    assert raised.value.get_http_status_code() == 413
