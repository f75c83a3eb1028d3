"""Claims about the page of a workstation: it shows the model's predictions, and no upload leaves memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page
from starlette.requests import Request
from starlette.testclient import TestClient

from flows.cli import workstation
from medfocus import phantoms
from medfocus.app import clicks
from medfocus.app.clicks import Point
from medfocus.app.desk import Desk
from medfocus.app.guard import Refused, access_to
from medfocus.app.reading import Reader
from medfocus.app.server import About, ServerLimits, Workplace, build, calibration_note, promise_note
from medfocus.app.uploads import UploadLimits, body
from medfocus.clip.build import build_clip
from medfocus.explain.explain import explain
from medfocus.focus.view import view
from medfocus.images import decode
from medfocus.learning.calibration import Calibration
from medfocus.learning.method import Support
from medfocus.masks import candidates
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.sam2.fast_segmenter import FastSegmenter
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.segmenter import Mask, Segmenter, identity
from medfocus.masks.settings import Sam2Settings
from medfocus.methods.clip import ClipLinearProbe
from medfocus.serving import checkpoint
from medfocus.serving.model_folder import load_model, save_model
from tests.segmenters import amplify, hiera

HOME = "http://127.0.0.1:8600"
CALIBRATION = Calibration(temperature=0.5, threshold=0.3, confidence=0.9, images=12)
ABOUT = About("medfocus-brain", "3 (champion)", "brain", "clip-linear-probe", "SAM2", {"ece": 0.0625})
CLASSES = ("glioma", "no tumor")
MISSED, LESION = 24, (0.36, 0.46)  # a glioma outside its first mask, and its position x, y
SEGMENTER = Sam2Settings("pocket", "pocket", 128, "grid", points_per_side=4, follow_edges=True)


def drawn(number: int) -> np.ndarray:
    """Draw a phantom (192, 192, 3); the parity of the number gives the class."""
    label = CLASSES[number % 2]
    phantom = phantoms.draw("brain_mri", label, phantoms.generator(7, "brain_mri", "test", label, number))
    return np.repeat(phantom.image[..., None], 3, axis=2)


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawn(number)).save(buffer, kind)
    return buffer.getvalue()


def save(folder: Path, segmenter: Segmenter) -> Path:
    """Save a linear probe on eight phantoms, with the packaged networks, as a model folder."""
    encoder = build_clip("pocket", "pocket")
    method = ClipLinearProbe(encoder, folds=3)
    images = [drawn(number) for number in range(8)]
    views = [
        view(image, mask.region, focus="multiply", frame=encoder.frame, feather=0.01)
        for image, mask in zip(images, segmenter.segment(images), strict=True)
    ]
    features = method.embed(torch.from_numpy(np.stack(views)))
    support = Support(features[None], torch.tensor([0, 1] * 4), torch.arange(8), torch.eye(2, encoder.dim))
    method.fit(support, torch.Generator().manual_seed(0))
    header = checkpoint.Header(
        "clip-linear-probe", {"folds": 3}, CLASSES, "multiply", encoder.key, 0, 0, facts={"key": "probe"},
        calibration=CALIBRATION,
    )  # fmt: skip
    checkpoint.save(method, header, folder / "cell.safetensors")
    save_model(
        folder / "model", checkpoint=folder / "cell.safetensors", encoder=encoder, segmenter=segmenter,
        feather=0.01, fill="mean",
    )  # fmt: skip
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with masks from SAM2."""
    return save(tmp_path_factory.mktemp("sam2"), load_sam2(SEGMENTER))


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(load_model(folder))


@pytest.fixture(scope="module")
def otsu(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A model without SAM2."""
    return Reader(load_model(save(tmp_path_factory.mktemp("otsu"), OtsuSegmenter())))


Opener = Callable[..., TestClient]


@pytest.fixture
def opened(reader: Reader) -> Iterator[Opener]:
    """Opens the page as a browser on this machine does, with given limits."""
    clients: list[TestClient] = []

    def open_page(limits: ServerLimits | None = None, model: Reader = reader) -> TestClient:
        app = build(Workplace(model, limits), ABOUT, access_to("127.0.0.1", None))
        client = TestClient(app, base_url=HOME, headers={"Origin": HOME})
        clients.append(client.__enter__())
        return client

    yield open_page
    for client in clients:
        client.__exit__(None, None, None)


def given(*images: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", image) for image in images]


def post(client: TestClient, *numbers: int) -> list[dict[str, Any]]:
    answer = client.post("/images", files=given(*((f"{n}.png", encoded(n)) for n in numbers)))
    assert answer.status_code == 200, answer.text
    return answer.json()["images"]


def set_points(client: TestClient, name: str, *points: tuple[float, float, bool]) -> Any:
    content = {"points": [{"x": x, "y": y, "inside": inside} for x, y, inside in points]}
    return client.post(f"/images/{name}/points", json=content)


def shown(layer: str) -> np.ndarray:
    """Decode a layer of the page."""
    data = base64.b64decode(layer.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(data)))


def region_of(reading: dict[str, Any]) -> np.ndarray:
    return shown(reading["layers"]["mask"])[..., 3] > 0


# --- predictions -------------------------------------------------------------------------------


def test_each_image_gets_the_models_probabilities_and_mask(opened: Opener, reader: Reader) -> None:
    answers = post(opened(), 20, 21, 22)
    expected = reader.predictor.predict([encoded(number) for number in (20, 21, 22)])
    for answer, prediction in zip(answers, expected, strict=True):
        first = answer["first"]
        assert first["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
        assert first["label"] == prediction.label
        assert first["mask"]["status"] == prediction.mask_status
        assert first["mask"]["score"] == pytest.approx(prediction.mask_score, abs=1e-6)
        assert np.array_equal(region_of(first), prediction.mask)
        assert shown(answer["shown"]["image"]).shape == (192, 192, 3)
    assert np.ptp([answer["first"]["probabilities"]["glioma"] for answer in answers]) > 0.1


def test_the_input_of_clip_is_the_focus_with_the_mask(opened: Opener, reader: Reader) -> None:
    [answer] = post(opened(), 20)
    frame = reader.predictor.frame
    seen = view(drawn(20), region_of(answer["first"]), focus="multiply", frame=frame, feather=0.01)
    assert np.array_equal(shown(answer["first"]["layers"]["view"]), seen)


def test_the_attribution_is_that_of_explain(opened: Opener, reader: Reader) -> None:
    client = opened()
    [answer] = post(client, 20)
    result = client.get(f"/images/{answer['id']}/first/attribution").json()
    frame = reader.predictor.frame
    seen = view(drawn(20), region_of(answer["first"]), focus="multiply", frame=frame, feather=0.01)
    target = torch.tensor([CLASSES.index(answer["first"]["label"])])
    method = reader.predictor.method
    maps, way = explain(method, method.encoder, torch.from_numpy(seen)[None], target)
    assert result["way"] == way
    heat = shown(result["layer"])
    assert heat.shape == (192, 192, 4)
    hottest = np.unravel_index(int(maps[0].argmax()), maps[0].shape)
    at = [int((place + 0.5) * 192 / frame.size) for place in hottest]
    assert heat[at[0], at[1], 3] > 250


def test_a_large_image_is_read_in_full_and_shown_smaller(opened: Opener) -> None:
    buffer = io.BytesIO()
    Image.fromarray(drawn(20)).resize((1500, 1200)).save(buffer, "JPEG")
    answer = opened().post("/images", files=given(("x.jpg", buffer.getvalue())))
    [result] = answer.json()["images"]
    assert (result["width"], result["height"], result["shown"]["size"]) == (1500, 1200, [1024, 819])
    assert region_of(result["first"]).shape == (819, 1024)


def test_the_page_names_the_model_and_excludes_clinical_use(opened: Opener) -> None:
    page = opened().get("/").text
    for part in (
        "For research; not for clinical use.",
        *CLASSES,
        "multiply",
        "medfocus-brain",
        "3 (champion)",
    ):
        assert part in page
    assert "6.2 percentage points" in page
    assert "contains the true class in 90\u00a0% of cases" in page


def test_each_answer_has_the_set_of_classes_that_reach_the_threshold(opened: Opener) -> None:
    for number in (20, 21, MISSED):
        [answer] = post(opened(), number)
        chances = answer["first"]["probabilities"]
        assert answer["first"]["set"] == [name for name in CLASSES if chances[name] >= 0.3]


def test_the_promise_has_its_measured_coverage_or_the_reason_for_no_set() -> None:
    measured = {"coverage": 0.875, "mean_set_size": 1.25}
    assert promise_note(CALIBRATION, measured).endswith(
        "On the test images: 87.5\u00a0%, 1.25 classes on average."
    )
    assert promise_note(CALIBRATION, {}).endswith("learned from.")
    few = Calibration(images=6)
    assert promise_note(few, {}) == "No set: 6 labelled images cannot support a 90 % promise; 9 are needed."


def test_unknown_calibration_is_reported() -> None:
    assert calibration_note({"accuracy": 0.9}).endswith("is unknown.")
    assert "12.5 percentage points" in calibration_note({"ece": 0.125, "accuracy": 0.5})
    assert "50.0\u00a0%" in calibration_note({"ece": 0.125, "accuracy": 0.5})


# --- points -------------------------------------------------------------------------------------


def test_a_click_changes_the_mask_and_the_prediction_follows_it(opened: Opener, reader: Reader) -> None:
    client = opened()
    [answer] = post(client, MISSED)
    result = set_points(client, answer["id"], (*LESION, True)).json()
    region = region_of(result["edited"])
    assert region[int(LESION[1] * 192), int(LESION[0] * 192)] and result["followed"] == 1
    assert not np.array_equal(region, region_of(answer["first"]))
    predictor = reader.predictor
    seen = view(drawn(MISSED), region, focus="multiply", frame=predictor.frame, feather=0.01)
    expected = predictor.probabilities(seen[None])[0]
    assert list(result["edited"]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert (answer["first"]["label"], result["edited"]["label"]) == ("no tumor", "glioma")
    assert result["edited"]["mask"]["status"] == "edited"


def test_an_image_is_encoded_once_for_all_its_points(
    opened: Opener, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter: Any = reader.predictor.segmenter
    encode, calls = segmenter.encode, []
    monkeypatch.setattr(segmenter, "encode", lambda images: calls.append(1) or encode(images))
    client = opened()
    [answer] = post(client, 20)
    for x in (0.3, 0.5, 0.6):
        assert set_points(client, answer["id"], (x, 0.5, True)).status_code == 200
    assert len(calls) == 1


def test_a_point_gives_the_mask_of_sam2s_predictor(reader: Reader) -> None:
    """SAM2ImagePredictor with ``point_coords`` and ``point_labels``; the best candidate by predicted IoU."""
    segmenter: Any = reader.predictor.segmenter
    image, point = drawn(20), Point(0.35, 0.6, True)
    predictor = segmenter.predictor
    predictor.set_image(image)
    coords, labels = np.array([[0.35 * 192, 0.6 * 192]]), np.array([1])
    masks, iou, _ = predictor.predict(coords, labels, multimask_output=True, return_logits=True)
    predictor.reset_predictor()
    made = clicks.mask_at(segmenter, image, clicks.encode(segmenter, image), [point])
    own = masks[int(iou.argmax())] > 0
    assert made.score == pytest.approx(float(iou.max()), abs=1e-4)
    assert (made.region & own).sum() / (made.region | own).sum() > 0.85  # this mask also follows edges


def test_a_single_point_outside_keeps_the_middle_of_the_first_mask(opened: Opener, reader: Reader) -> None:
    client = opened()
    [answer] = post(client, 20)
    middle = clicks.deepest(region_of(answer["first"]))
    alone = set_points(client, answer["id"], (0.05, 0.05, False)).json()
    both = set_points(client, answer["id"], (middle.x, middle.y, True), (0.05, 0.05, False)).json()
    assert alone["edited"]["layers"] == both["edited"]["layers"]
    assert not region_of(alone["edited"])[int(0.05 * 192), int(0.05 * 192)]


@dataclass(frozen=True)
class Guided:
    """Returns other masks than its SAM2, as with an adapter or a text."""

    sam2: Sam2Segmenter
    key = "guided"
    settings = SEGMENTER

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        return [identity(*image.shape[:2]) for image in images]


def test_points_edit_guided_masks_with_plain_sam2(opened: Opener, reader: Reader) -> None:
    plain: Any = reader.predictor.segmenter
    guided = Reader(replace(reader.predictor, segmenter=Guided(plain)))
    [answer] = post(client := opened(model=guided), MISSED)
    assert answer["first"]["mask"]["status"] == "identity"
    result = set_points(client, answer["id"], (*LESION, True)).json()
    [own] = post(other := opened(), MISSED)
    assert result == set_points(other, own["id"], (*LESION, True)).json()


def test_a_fast_segmenter_gives_the_plain_segmenters_mask_at_points(tmp_path: Path) -> None:
    plain = load_sam2(Sam2Settings(hiera(tmp_path), "random:0", 128, "grid", follow_edges=True))
    amplify(plain.model)
    fast, image = FastSegmenter(plain), drawn(20)
    points = [Point(0.4, 0.5, True), Point(0.6, 0.4, True), Point(0.1, 0.1, False)]
    made, expected = (
        clicks.mask_at(each, image, clicks.encode(each, image), points) for each in (fast, plain)
    )
    assert made.score == pytest.approx(expected.score, abs=1e-4)
    assert (made.region != expected.region).mean() < 0.001


def test_a_candidate_is_judged_by_the_points_that_it_follows() -> None:
    region = np.zeros((4, 4), bool)
    region[:2, :2] = True
    coords, labels = np.array([[0.1, 0.1], [0.9, 0.9], [0.9, 0.1], [1.0, 1.0]]), np.array([1, 0, 1, 1])
    assert candidates.agreeing(region, coords, labels) == 2
    assert candidates.agreeing(~region, coords, labels) == 2
    assert candidates.agreeing(np.ones((4, 4), bool), coords, labels) == 3


def test_the_deepest_point_of_a_region_is_the_middle_of_its_widest_part() -> None:
    region = np.zeros((40, 80), bool)
    region[10:31, 10:31] = True
    region[20, 31:70] = True
    point = clicks.deepest(region)
    assert (point.x, point.y) == (20.5 / 80, 20.5 / 40)


def test_no_points_bring_the_first_mask_back(opened: Opener) -> None:
    client = opened()
    [answer] = post(client, 20)
    set_points(client, answer["id"], (0.35, 0.6, True))
    assert client.get(f"/images/{answer['id']}/edited/attribution").status_code == 200
    assert set_points(client, answer["id"]).json() == {"edited": None, "followed": 0}
    gone = client.get(f"/images/{answer['id']}/edited/attribution")
    assert gone.status_code == 404 and gone.json()["error"]["fault"] == "has no edited mask"


def test_without_sam2_masks_cannot_be_edited_and_the_page_says_why(opened: Opener, otsu: Reader) -> None:
    client = opened(model=otsu)
    [answer] = post(client, 20)
    refused = set_points(client, answer["id"], (0.5, 0.5, True))
    assert refused.status_code == 409
    assert refused.json()["error"]["fault"] == "cannot be edited: this model's masks are not SAM2's"
    assert 'data-pointed="no"' in client.get("/").text


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"points": [{"x": 1.5, "y": 0, "inside": true}]}',
        b'{"points": [{"x": NaN, "y": 0, "inside": true}]}',
        json.dumps({"points": [{"x": 0, "y": 0, "inside": True}] * 65}).encode(),
    ],
)
def test_invalid_points_are_refused(opened: Opener, content: bytes) -> None:
    client = opened()
    [answer] = post(client, 20)
    refused = client.post(f"/images/{answer['id']}/points", content=content)
    assert refused.status_code == 422 and refused.json()["error"]["place"] == "the points"


# --- uploads ------------------------------------------------------------------------------


def test_a_broken_image_gets_its_own_error_and_the_others_are_read(opened: Opener) -> None:
    files = given(("a.png", encoded(20)), ("b.png", b"no image"), ("c.png", encoded(21)[:300]))
    answer = opened().post("/images", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["images"]
    assert "error" not in first
    assert second["error"] == {
        "status": 422,
        "place": "b.png",
        "fault": f"is not in a supported image format ({', '.join((*decode.FORMATS, 'DICOM', 'NIFTI'))})",
        "fix": "Export it again as PNG, or remove it.",
    }
    assert third["error"]["place"] == "c.png" and "cannot be decoded" in third["error"]["fault"]


def test_without_a_readable_image_the_response_is_an_error(opened: Opener) -> None:
    answer = opened().post("/images", files=given(("b.png", b"no image")))
    assert answer.status_code == 422


def test_an_image_with_too_many_pixels_is_refused_by_its_header(opened: Opener) -> None:
    header = io.BytesIO()
    Image.new("1", (8001, 8000)).save(header, "PNG")
    answer = opened().post("/images", files=given(("big.png", header.getvalue())))
    assert answer.status_code == 413
    assert "the limit is 64 megapixels" in answer.json()["images"][0]["error"]["fault"]


def test_a_file_with_too_many_bytes_is_refused(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medfocus.images.decode.MOST_BYTES", 1000)
    answer = opened().post("/images", files=given(("big.png", encoded(20))))
    assert answer.status_code == 413
    assert "the limit" in answer.json()["images"][0]["error"]["fault"]


def test_a_request_beyond_a_limit_is_refused_with_the_limit(opened: Opener) -> None:
    client = opened(ServerLimits(upload=UploadLimits(files=2, bytes=40_000)))
    many = client.post("/images", files=given(*((f"{i}.png", b"x") for i in range(3))))
    assert (many.status_code, many.json()["error"]["fault"]) == (413, "has more than 2 files")
    large = client.post("/images", files=given(("a.png", bytes(50_000))))
    assert (large.status_code, large.json()["error"]["place"]) == (413, "the request")


def test_a_body_of_unknown_length_is_read_up_to_the_limit_only() -> None:
    pieces = 0

    async def receive() -> dict[str, Any]:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def read() -> None:
        async for _ in body(Request({"type": "http", "headers": []}, receive), 40_000):
            pass

    with pytest.raises(Refused, match="the request: is larger than 40 kB, the limit"):
        asyncio.run(read())
    assert pieces == 41


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"x", "multipart/form-data; boundary=b", 400),
        (b"", "multipart/form-data", 400),
    ],
)
def test_a_request_without_a_form_of_files_is_refused(
    opened: Opener, content: bytes, kind: str, status: int
) -> None:
    answer = opened().post("/images", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and answer.json()["error"]["place"] == "the request"


def test_a_full_queue_gives_503(opened: Opener) -> None:
    answer = opened(ServerLimits(jobs=0)).post("/images", files=given(("a.png", encoded(20))))
    assert answer.status_code == 503
    assert answer.json()["images"][0]["error"]["fix"] == "Try again in a moment."


WATCHED: list[str] = []
WATCHING = threading.Event()


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook that records every file opened for writing, also files without a name."""
    if event == "open" and WATCHING.is_set():
        flags = arguments[2] or 0
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WATCHED.append(str(arguments[0]))


def test_an_upload_is_never_written_to_a_file(opened: Opener) -> None:
    client = opened()
    post(client, 20)  # loads everything that the first image needs
    sys.addaudithook(watch)
    buffer = io.BytesIO()
    Image.fromarray(drawn(20)).resize((1000, 1000)).save(buffer, "BMP")
    assert len(buffer.getvalue()) > 2_500_000  # Starlette's parser would write it to a file
    WATCHING.set()
    try:
        answer = client.post("/images", files=given(("large.bmp", buffer.getvalue())))
        set_points(client, answer.json()["images"][0]["id"], (0.5, 0.5, True))
        written = list(WATCHED)
        with tempfile.SpooledTemporaryFile(max_size=10) as spooled:
            spooled.write(bytes(11))
        assert len(WATCHED) > len(written)  # the hook records files
    finally:
        WATCHING.clear()
    assert answer.status_code == 200 and written == []


# --- images in memory -------------------------------------------------------------------------------


class Weight:
    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes


def test_images_expire_by_number_bytes_and_time() -> None:
    now = [0.0]
    desk: Desk[Weight] = Desk(most=2, most_bytes=100, seconds=60, clock=lambda: now[0])
    first, second = desk.put(Weight()), desk.put(Weight())
    assert desk.get(first) is not None  # now the second image is the least recently used
    third = desk.put(Weight())
    assert desk.get(second) is None and desk.get(first) and desk.get(third)
    heavy = desk.put(Weight(1000))
    assert desk.get(heavy) is not None and len(desk) == 1
    now[0] = 59.0
    assert desk.get(heavy) is not None
    now[0] = 118.9
    assert desk.get(heavy) is not None
    now[0] = 178.9
    assert desk.get(heavy) is None and len(desk) == 0


def test_an_expired_image_is_404_with_the_limits(opened: Opener) -> None:
    client = opened(ServerLimits(images=1))
    first, second = post(client, 20, 21)
    gone = set_points(client, first["id"], (0.5, 0.5, True))
    assert gone.status_code == 404
    assert (
        gone.json()["error"]["fault"]
        == "is no longer in memory (the server keeps 1 images, each for 30 minutes)"
    )
    assert set_points(client, second["id"], (0.5, 0.5, True)).status_code == 200


def test_images_expire_without_requests(reader: Reader) -> None:
    workplace = Workplace(reader, ServerLimits(seconds=0.2))
    app = build(workplace, ABOUT, access_to("127.0.0.1", None))
    with TestClient(app, base_url=HOME, headers={"Origin": HOME}) as client:
        [answer] = post(client, 20)
        assert len(workplace.desk) == 1
        end = time.monotonic() + 10
        while len(workplace.desk) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(workplace.desk) == 0
        assert set_points(client, answer["id"], (0.5, 0.5, True)).status_code == 404


def test_a_removed_image_is_gone_at_once(opened: Opener) -> None:
    client = opened()
    [answer] = post(client, 20)
    assert client.delete(f"/images/{answer['id']}").status_code == 204
    assert set_points(client, answer["id"], (0.5, 0.5, True)).status_code == 404


def test_nobody_can_guess_an_images_address() -> None:
    desk: Desk[Weight] = Desk(most=99, most_bytes=99, seconds=9)
    names = {desk.put(Weight()) for _ in range(50)}
    assert len(names) == 50 and all(len(base64.urlsafe_b64decode(name + "==")) == 16 for name in names)


# --- access --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8600", "127.0.0.1.evil.example", "192.168.0.5", ""]
)
def test_a_request_for_another_host_is_refused(opened: Opener, host: str) -> None:
    """With DNS rebinding, a page of another site sends requests here, with its own host."""
    client = opened()
    assert client.get("/", headers={"Host": host}).status_code == 421
    assert (
        client.get("/", headers={"Host": "localhost:9000", "Origin": "http://localhost:9000"}).status_code
        == 200
    )


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8600"]
)
def test_a_request_from_another_origin_is_refused(opened: Opener, origin: str) -> None:
    client = opened()
    answer = client.post("/images", files=given(("a.png", encoded(20))), headers={"Origin": origin})
    assert answer.status_code == 403
    assert client.delete("/images/x", headers={"Origin": origin}).status_code == 403


def test_a_change_without_an_origin_is_refused(reader: Reader) -> None:
    with TestClient(build(Workplace(reader), ABOUT, access_to("127.0.0.1", None)), base_url=HOME) as client:
        assert client.get("/").status_code == 200
        assert client.post("/images", files=given(("a.png", encoded(20)))).status_code == 403


def test_beyond_loopback_addresses_are_accepted_and_other_names_are_not(reader: Reader) -> None:
    with TestClient(build(Workplace(reader), ABOUT, access_to("0.0.0.0", "secret")), base_url=HOME) as client:
        client.auth = ("", "secret")
        for host in ("192.168.0.5:8600", "[fe80::1]:8600", socket.gethostname()):
            assert client.get("/", headers={"Host": host}).status_code == 200
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_a_configured_password_is_required(reader: Reader) -> None:
    with TestClient(
        build(Workplace(reader), ABOUT, access_to("127.0.0.1", "geheim ü")), base_url=HOME
    ) as client:
        answer = client.get("/")
        assert (answer.status_code, answer.headers["WWW-Authenticate"][:5]) == (401, "Basic")
        for path in ("/page.js", "/images/x/first/attribution"):
            assert client.get(path).status_code == 401
        assert client.get("/", auth=("", "wrong")).status_code == 401
        assert client.get("/", headers={"Authorization": "Basic !"}).status_code == 401
        assert client.get("/", auth=("anybody", "geheim ü")).status_code == 200


def test_beyond_loopback_the_page_needs_a_password_to_start() -> None:
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0 is beyond loopback.*Set MEDFOCUS_APP_PASSWORD"):
        workstation.password("0.0.0.0", {"MEDFOCUS_APP_PASSWORD": ""})
    assert workstation.password("0.0.0.0", {"MEDFOCUS_APP_PASSWORD": "x"}) == "x"
    for host in ("127.0.0.1", "localhost", "::1"):
        assert workstation.password(host, {}) is None


def test_a_port_in_use_is_named_with_the_fix() -> None:
    with workstation.listening("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*another --port"):
            workstation.listening("127.0.0.1", port)


def test_every_response_forbids_external_content_and_caching(opened: Opener) -> None:
    client = opened()
    for answer in (
        client.get("/"),
        client.get("/page.js"),
        client.get("/nothing"),
        client.get("/", headers={"Host": "x"}),
    ):
        assert answer.headers["Cache-Control"] == "no-store"
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy and "*" not in policy and "unsafe" not in policy


def test_no_path_leads_outside_the_page(opened: Opener) -> None:
    client = opened()
    for path in ("/..%2fserver.py", "/index.html", "/server.py", "/docs", "/openapi.json", "/images"):
        assert client.get(path).status_code in (404, 405)


def test_an_internal_error_is_reported_without_its_text(
    opened: Opener, reader: Reader, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken in Anna_Example.png")

    client, files = opened(), given(("Anna_Example.png", encoded(20)))
    monkeypatch.setattr(reader, "open", fail)
    [result] = client.post("/images", files=files).json()["images"]
    assert result["error"]["status"] == 500
    assert result["error"]["fault"].startswith("cannot be read (RuntimeError at ")
    monkeypatch.setattr("medfocus.app.server.uploads", fail)
    answer = client.post("/images", files=files)
    assert answer.status_code == 500
    assert answer.json()["error"]["fault"].startswith("failed (RuntimeError at ")
    output = capfd.readouterr()
    assert "RuntimeError at" in output.err
    assert "Anna" not in json.dumps(result["error"]) + answer.text + output.out + output.err


def test_a_model_folder_is_shown_by_its_name_alone(folder: Path) -> None:
    _, about = workstation.load(Path.cwd(), str(folder))
    assert (about.model, about.version, about.dataset, about.measured) == ("model", "", "", {})
    assert about.segmenter == "SAM2"


def test_without_a_display_no_browser_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not workstation.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert workstation.has_display()


# --- the page in a browser ----------------------------------------------------------------------


@contextlib.contextmanager
def served(model: Reader) -> Iterator[str]:
    """Serve the page as ``medfocus app`` does; yield its address."""
    bound = workstation.listening("127.0.0.1", 0)
    server = workstation.configured(build(Workplace(model), ABOUT, access_to("127.0.0.1", None)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@contextlib.contextmanager
def visited(browser: Browser, model: Reader) -> Iterator[Page]:
    """Open the page; check that it requests nothing from elsewhere and writes nothing to the console."""
    requests, console = [], []
    with served(model) as url, browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(url)
        yield page
        elsewhere = [each for each in requests if not each.startswith((f"{url}/", "data:image/png;base64,"))]
        assert len(requests) > 3 and elsewhere == [] and console == []


@pytest.fixture
def page(browser: Browser, reader: Reader) -> Iterator[Page]:
    with visited(browser, reader) as page:
        yield page


def upload(page: Page, tmp_path: Path, number: int = MISSED) -> Locator:
    """Upload an image and return its card."""
    (tmp_path / "Anna_Example.png").write_bytes(encoded(number))
    page.locator("#files").set_input_files(tmp_path / "Anna_Example.png")
    card = page.locator(".card")
    card.locator(".result").wait_for()
    return card


def chances(card: Locator) -> list[str]:
    return card.locator(".chances td.now").all_inner_texts()


def test_a_click_on_the_page_changes_the_probabilities(
    page: Page, reader: Reader, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notice = page.get_by_text("For research; not for clinical use.")
    assert notice.is_visible()
    card = upload(page, tmp_path)
    [expected] = reader.predictor.predict([encoded(MISSED)])
    first = [f"{100 * p:.1f}\u00a0%" for p in expected.probabilities.values()]
    assert chances(card) == first
    assert card.locator(".answer .label").inner_text() == expected.label
    assert card.get_by_text("Calibration error of this model: 6.2 percentage points.").is_visible()
    for name in ("image", "layer.mask"):
        drawn_width = card.locator(f"img.{name}").evaluate("image => image.complete && image.naturalWidth")
        assert drawn_width == 192

    card.get_by_role("slider", name="Mask").fill("20")
    assert card.locator("img.layer.mask").evaluate("image => image.style.opacity") == "0.2"
    card.get_by_role("slider", name="Attribution").fill("50")
    card.get_by_text("Grad-CAM").wait_for()
    assert card.locator("img.layer.attribution").is_visible()

    before = card.locator("img.layer.mask").get_attribute("src")
    box = card.locator(".frame").bounding_box()
    assert box is not None and box["width"] == pytest.approx(box["height"])
    card.locator(".frame").click(position={"x": LESION[0] * box["width"], "y": LESION[1] * box["height"]})
    card.locator(".chances td.after").first.wait_for()
    assert card.locator("img.layer.mask").get_attribute("src") != before
    assert card.locator(".chances td.before").all_inner_texts() == first and chances(card) != first
    assert card.locator(".answer .label").inner_text() == "glioma" != expected.label
    assert card.locator("figure.after img").is_visible()
    page.mouse.wheel(0, 2000)
    assert notice.is_visible() and notice.evaluate("e => e.getBoundingClientRect().top") >= 0

    card.locator(".frame").click(position={"x": 5, "y": 5}, button="right")
    card.locator(".mark.out").wait_for()
    card.get_by_role("button", name="Clear").click()
    card.locator(".chances td.after").first.wait_for(state="detached")
    assert chances(card) == first
    output = capfd.readouterr()
    assert "Anna" not in output.out + output.err


def test_the_page_works_with_keyboard_and_screen_reader(page: Page, tmp_path: Path) -> None:
    card = upload(page, tmp_path)
    card.locator(".frame").focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    card.locator(".chances td.after").first.wait_for()
    mark = card.locator(".mark.in")
    assert mark.evaluate("e => [e.style.left, e.style.top]") == ["35%", "51%"]
    page.keyboard.press("Backspace")
    card.locator(".chances td.after").first.wait_for(state="detached")
    assert "Anna_Example.png" in (card.locator("img.image").get_attribute("alt") or "")
    for image in card.locator("img:visible").all():
        assert image.get_attribute("alt")
    for control in page.locator("input:visible, button:visible").all():
        assert control.evaluate("e => e.labels?.length || e.textContent.trim() || e.ariaLabel")
    card.get_by_role("button", name="Remove Anna_Example.png").press("Enter")
    assert page.locator(".card").count() == 0
    assert page.evaluate("document.activeElement.id") == "files"


def test_the_page_fits_a_narrow_screen(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    card = upload(page, tmp_path)
    card.locator(".frame").click()
    card.locator(".chances td.after").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("th[scope=row]").first.evaluate("e => e.getClientRects()[0].height") < 40


def test_a_file_that_is_no_image_is_reported_on_its_card(page: Page, tmp_path: Path) -> None:
    page.route(
        "**/images",
        lambda route: route.fulfill(
            json={
                "images": [
                    {
                        "name": "x.png",
                        "error": {
                            "status": 422,
                            "place": "x.png",
                            "fault": "cannot be decoded (<b>odd</b>)",
                            "fix": "Export it again.",
                        },
                    }
                ]
            }
        ),
    )  # a real 4xx response would write to the console
    (tmp_path / "x.png").write_bytes(b"no image")
    page.locator("#files").set_input_files(tmp_path / "x.png")
    error = page.locator(".card .error")
    error.wait_for()
    assert error.locator("p").all_inner_texts() == [
        "This file cannot be decoded (<b>odd</b>).",
        "Export it again.",
    ]


def test_the_page_says_why_masks_cannot_be_edited(browser: Browser, otsu: Reader, tmp_path: Path) -> None:
    with visited(browser, otsu) as page:
        card = upload(page, tmp_path)
        assert "points need SAM2" in card.locator(".off").inner_text()
        card.locator(".frame").click()
        assert card.get_by_role("button", name="Undo").count() == 0
        assert card.locator(".mark").count() == 0
