"""The page of a study: sentences, figures and tables."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medfocus.datasets.duplicates import Pair
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits
from medfocus.evaluation.comparison import Difference
from medfocus.evaluation.metrics import reliability, wilson
from medfocus.reports import figures
from medfocus.reports.data_warnings import data_warnings, mask_warnings
from medfocus.reports.page import render
from medfocus.reports.page_content import (
    Calibration,
    Confusion,
    Cost,
    Example,
    PageContent,
    Provenance,
    Recalls,
    Sets,
)
from medfocus.reports.rows import Published, StudyRow, read_published
from medfocus.reports.tables import plot_table
from medfocus.reports.verdicts import verdict_sentences

VOID = {"meta", "link", "img", "source", "br"}
CURVE = reliability(np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]), np.array([0, 1, 1]), 10)
IMAGE = np.full((40, 60, 3), 120, dtype=np.uint8)
MASK = np.zeros((40, 60), dtype=bool)
MASK[10:30, 20:50] = True


class Page(HTMLParser):
    """The parsed content of a page. A tag that is closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []  # classes around it
        self.open: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), tuple(classes for _, classes in self.open)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1][0] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.tags if name == tag]


def cells(text: str, system: str) -> list[str]:
    """Return the cells of a system's first row as text, with asterisks around the best."""
    line = re.search(rf'<tr[^>]*><th scope="row">{re.escape(system)}[ <].*?</tr>', text, re.DOTALL)
    assert line
    columns = re.findall(r"<td(.*?)>(.*?)</td>", line[0], re.DOTALL)
    plain = [" ".join(unescape(re.sub(r"<[^>]+>", " ", content)).split()) for _, content in columns]
    return [
        f"*{p}*" if "best" in attributes else p for p, (attributes, _) in zip(plain, columns, strict=True)
    ]


def row(system: str, percent: float, accuracy: float, seed: int = 0, focus: str = "none") -> StudyRow:
    temperature, coverage = 1.5 if percent else 1.0, 0.9 if percent > 5 else math.nan
    return StudyRow("brain_mri", system, focus, percent, seed, accuracy, 0.5, 0.5, 0.5, 0.1, 0.25,
                    temperature, coverage, 1.25, "official", int(2 * percent), 66, "id")  # fmt: skip


ROWS = [
    row(system, percent, accuracy + 0.02 * seed, seed)
    for system, accuracies in {"clip": (0.50, 0.60), "ours": (0.70, 0.72), "pixels": (0.40, 0.72)}.items()
    for percent, accuracy in zip((5.0, 100.0), accuracies, strict=True)
    for seed in (0, 1)
] + [row("zero", 0.0, 0.55), *(row("ours", 5.0, 0.3, seed, "inverse") for seed in (0, 1))]
DIFFERENCES = {
    ("ours", 5.0): Difference(0.2, 0.1, 0.3, 0.0004, 0.0002, 0.0004, 2, 66),
    ("ours", 100.0): Difference(0.12, -0.01, 0.25, 0.06, 0.04, 0.08, 2, 66),
    ("pixels", 5.0): Difference(-0.1, -0.2, -0.02, 0.01, 0.01, 0.03, 2, 66),
}
PARTS: dict[str, object] = {
    "rows": ROWS,
    "verdicts": ["It depends."],
    "gallery": [Example("brain", "ours", "a.png", IMAGE, "cyst", "tumor", 0.83, MASK, IMAGE,
                        MASK.astype(float), 0.61)],
    "confusions": [Confusion("brain", "ours", ("cyst", "tumor"), np.array([[3, 1], [0, 5]]))],
    "calibrations": [Calibration("brain", "ours", CURVE)],
    "sets": [Sets("brain", "ours", ("cyst", "tumor"), 0.9, np.array([[1, 0], [1, 1], [1, 0]], bool),
                  np.array([0, 0, 1]), "")],
    "recalls": [Recalls("brain", "5 %", ("cyst", "tumor"), (4, 0),
                        {"ours": np.array([[0.5, np.nan], [0.75, np.nan]])})],
    "masks": {"brain": [{"label": "cyst", "images": "4", "coverage": "0.25", "box": "0.5", "iou": ""}]},
    "costs": [Cost("ours", 1.25, 3120.4, None, 16384)],
    "warnings": {"brain": ["Tiny classes."], "chest": []},
    "provenance": Provenance("make run", {"git.commit": "abc123"}, "seed: 0"),
}  # fmt: skip
SECTIONS = {
    "rows": ["verdicts", "accuracy", "tables"],
    "verdicts": ["verdicts"],
    "gallery": ["gallery"],
    "confusions": ["confusion"],
    "calibrations": ["calibration"],
    "sets": ["sets"],
    "recalls": ["recall"],
    "masks": ["masks"],
    "costs": ["costs"],
    "warnings": ["warnings"],
    "provenance": ["reproduce"],
}


def full(**changes: object) -> PageContent:
    content = {
        **PARTS,
        "baseline": "clip",
        "differences": {("brain_mri", "official"): DIFFERENCES},
        "published": [
            Published("brain-mri", "Theirs", 5.0, 99.0),
            Published("chest", "Elsewhere", 5.0, 98.0),
            Published("brain-mri", "Other percents", 7.0, 97.0),
        ],
    }
    return PageContent("study", **{**content, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page() -> str:
    return render(full())


def test_the_page_loads_no_resource_and_runs_no_script(page: str) -> None:
    parsed = Page(page)
    assert "://" not in page and "@import" not in page and "url(" not in page
    assert not parsed.all("script") and not parsed.all("iframe")
    assert not [name for _, attributes, _ in parsed.tags for name in attributes if name.startswith("on")]
    loaded = [a.get(k) for tag, k in (("img", "src"), ("source", "srcset"), ("link", "href"))
              for a in parsed.all(tag)]  # fmt: skip
    assert len(loaded) > 8 and all(str(place).startswith("data:") for place in loaded)
    policy = next(
        a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy).startswith("default-src 'none'")


def test_every_link_has_a_target_and_every_section_is_in_the_contents(page: str) -> None:
    parsed = Page(page)
    ids = [str(a["id"]) for _, a, _ in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for a in parsed.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(
        links.count(f"#{name}") == 2 for names in SECTIONS.values() for name in names
    )  # and its anchor


def test_images_have_alternative_texts_and_figures_a_dark_version(page: str) -> None:
    parsed = Page(page)
    assert all(len(str(a.get("alt"))) > 10 for a in parsed.all("img"))
    assert len(parsed.all("source")) == len(parsed.all("picture")) == 2
    alt = str(parsed.all("img")[0]["alt"])
    assert "ours 71.0 at 5 %, 73.0 at 100 %" in alt and "zero 55.0 at 0 %" in alt


def test_tables_scroll_in_boxes_that_the_keyboard_can_focus(page: str) -> None:
    parsed = Page(page)
    around = [around for tag, _, around in parsed.tags if tag == "table"]
    assert len(around) == 9 and all("scroll" in classes for classes in around)
    boxes = [a for a in parsed.all("div") if a.get("class") == "scroll"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in boxes)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_renders_alone(part: str) -> None:
    text = render(PageContent("alone", **{part: PARTS[part]}))  # type: ignore[arg-type]
    assert re.findall(r'<h2 id="(\w+)"', text) == SECTIONS[part]
    assert "None" not in Page(text).text


def test_the_page_of_an_empty_study_states_its_intended_use() -> None:
    text = Page(render(PageContent("nothing"))).text
    assert text.count("Research use only, not for clinical use") == 2
    assert "Contents" not in text


def test_equal_content_gives_equal_pages(page: str) -> None:
    assert render(full()) == page


def test_all_text_is_escaped() -> None:
    bad = '<img src=x onerror="1">'
    example = replace(PARTS["gallery"][0], name=bad, true_class=bad)  # type: ignore[index]
    text = render(
        PageContent(
            bad,
            verdicts=[bad],
            gallery=[example],
            confusions=[Confusion(bad, bad, (bad,), np.array([[1]]))],
            recalls=[Recalls(bad, bad, (bad,), (1,), {bad: np.array([[1.0]])})],
            masks={bad: [{"label": bad, "images": 1}]},
            costs=[Cost(bad)],
            warnings={bad: [bad]},
            provenance=Provenance(bad, {bad: bad}, bad),
        )
    )
    assert bad not in text
    assert not [a for a in Page(text).all("img") if "onerror" in a]


def test_the_best_of_each_column_is_marked_ties_included(page: str) -> None:
    # Two draws, 0.02 apart: t(0.975, 1) * 0.01414 / sqrt(2) = 12.7 points.
    assert cells(page, "clip") == ["–", "51.0 ± 12.7", "61.0 ± 12.7"]
    assert cells(page, "ours") == ["–", "*71.0 ± 12.7*", "*73.0 ± 12.7*"]
    assert cells(page, "pixels") == ["–", "41.0 ± 12.7", "*73.0 ± 12.7*"]
    assert cells(page, "zero") == ["*55.0*", "–", "–"]


def test_published_numbers_are_below_ours_marked_and_never_the_best(page: str) -> None:
    assert cells(page, "Theirs") == ["–", "99.0", "–"]
    assert re.search(r'<tr class="published first"><th scope="row">Theirs <span class="tag">published<', page)
    assert page.index(">Theirs") > page.index(">zero")
    assert "Elsewhere" not in page  # it has another data set
    assert "Other percents" not in page


def test_controls_and_the_baseline_are_marked(page: str) -> None:
    marked = re.findall(r'<th scope="row">([^<]+?) <span class="tag">(control|baseline)<', page)
    assert marked == [("clip", "baseline"), ("ours (inverse)", "control")]


def test_differences_show_their_interval_and_the_corrected_p_and_colour_follows_it(page: str) -> None:
    table = page[page.index("Difference to <strong>clip</strong>") :]
    assert cells(table, "ours") == ["▲ +20.0 +10.0 to +30.0 p < 0.001", "+12.0 −1.0 to +25.0 p = 0.080"]
    assert cells(table, "pixels") == ["▼ −10.0 −20.0 to −2.0 p = 0.030", "–"]
    assert re.findall(r'<td class="difference (\w*)">', table) == ["above", "", "below"]


def test_the_gallery_shows_the_prediction_and_the_attribution_inside_the_mask(page: str) -> None:
    words = " ".join(Page(page).text.split())
    assert "✗ wrong: predicted tumor (83 %), true class cyst" in words
    assert "61 % of the attribution lies inside the mask" in words
    assert re.findall(r"<figcaption>(\w+)</figcaption></figure>", page) == [
        "image", "mask", "focus", "attribution",
    ]  # fmt: skip


def test_the_tile_of_a_mask_is_tinted_inside_the_mask_only(page: str) -> None:
    uris = [str(a["src"]) for a in Page(page).all("img") if "mask in orange" in str(a["alt"])]
    tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(uris[0].split(",")[1]))).convert("RGB"))
    orange = tile[..., 0].astype(int) - tile[..., 2] > 60
    # 20 x 30 of 40 x 60 pixels, the longer side now 256.
    assert orange.sum() == pytest.approx(20 * 30 * (256 / 60) ** 2, rel=0.05)


def test_heat_is_drawn_over_the_systems_view() -> None:
    focus = np.zeros((30, 30, 3), dtype=np.uint8)
    example: Example = PARTS["gallery"][0]  # type: ignore[index, assignment]
    for attribution, shade in ((np.zeros((30, 30)), 0), (np.zeros((40, 60)), 120)):
        text = render(PageContent("s", gallery=[replace(example, focus=focus, attribution=attribution)]))
        (uri,) = [str(a["src"]) for a in Page(text).all("img") if "Heat of the" in str(a["alt"])]
        tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
        assert (tile[128, 128] == shade).all()


def test_the_numbers_of_the_other_tables(page: str) -> None:
    confusion = page[page.index('id="confusion"') :]
    assert cells(confusion, "cyst") == ["75 % 3", "25 % 1"]
    recall = page[page.index('id="recall"') :]
    assert cells(recall, "ours") == ["*62.5 ± 158.8*", "–"]
    masks = page[page.index('id="masks"') :]
    assert cells(masks, "cyst") == ["4", "25 %", "50 %", "–"]
    costs = page[page.index('id="costs"') :]
    assert cells(costs, "ours") == ["1.25", "3,120", "–", "16,384"]
    assert f"ECE {100 * CURVE.ece:.1f} %" in Page(page).text
    calibration = page[page.index('id="calibration"') :]
    assert cells(calibration, "ours") == ["–", "25.0 → 10.0 T 1.50 no set", "25.0 → 10.0 T 1.50 90 % in 1.25"]
    assert cells(calibration, "zero") == ["10.0 not calibrated", "–", "–"]
    sets = page[page.index('id="sets"') :]
    low, high = (100 * end for end in wilson(2, 3))
    assert cells(sets, "all")[:3] == ["3", f"66.7 % [{low:.1f}, {high:.1f}], 2 of 3", "1.33"]
    assert cells(sets, "tumor")[1].endswith("0 of 1") and cells(sets, "tumor")[4].endswith("0 of 1")
    assert cells(page, "git.commit") == ["abc123"]


def test_shapes_that_do_not_match_are_refused() -> None:
    example: Example = PARTS["gallery"][0]  # type: ignore[index, assignment]
    with pytest.raises(ValueError, match=r"counts are \(2, 2\) for 3 classes\. Give \(3, 3\)"):
        render(PageContent("s", confusions=[Confusion("brain", "ours", ("a", "b", "c"), np.eye(2))]))
    table = Recalls("brain", "5 %", ("a", "b", "c"), (1, 1, 1), {"ours": np.ones((1, 2))})
    with pytest.raises(ValueError, match=r"Recalls of brain: \(1, 2\) of ours and 3 counts for 3 classes"):
        render(PageContent("s", recalls=[table]))
    with pytest.raises(ValueError, match=r"'a.png': a mask of \(4, 6\) on an image of \(40, 60\) pixels"):
        render(PageContent("s", gallery=[replace(example, mask=np.ones((4, 6), bool))]))
    with pytest.raises(ValueError, match=r"\(4, 6\) values on an image of \(40, 60\) pixels\. Resize"):
        render(PageContent("s", gallery=[replace(example, attribution=np.ones((4, 6)))]))


def test_the_sentences_name_the_best_systems_the_zero_shot_level_and_the_lead() -> None:
    assert verdict_sentences(ROWS, "clip", DIFFERENCES) == [
        "Highest accuracy: ours at 5 and 100 % of train (71.0 to 73.0 %).",
        "Of 3 differences to clip, 1 is above and 1 below it at an adjusted p below 0.05. At 100 % of train "
        "ours differs from clip by +12.0 points (95 % interval −1.0 to +25.0, adjusted p = 0.080).",
    ]
    high = [*ROWS, row("zero-crop", 0.0, 0.72)]
    assert verdict_sentences(high)[1] == (
        "zero-crop needs no training image and scores 72.0 %, above every fitted system at 5 % of train."
    )
    assert verdict_sentences([row("zero", 0.0, 0.55)]) == ["zero needs no training image and scores 55.0 %."]


def record(path: str, label: str, split: str, patient: str = "p") -> Record:
    return Record(path, "0", 9, 9, "L", label, split, patient)


def splits(train: Sequence[str], test: Sequence[str], **changes: object) -> Splits:
    usual = Splits(["a", "b"], list(train), list(test), list(test), [], [], [], {}, {})
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_a_clean_data_set_has_no_warning() -> None:
    records = [record(f"{s}{c}{i}", c, s) for s in ("train", "test") for c in "ab" for i in range(10)]
    paths = {s: [r.path for r in records if r.split == s] for s in ("train", "test")}
    assert data_warnings(records, splits(paths["train"], paths["test"]), []) == []


def test_duplicates_patients_and_unequal_classes_are_warned_about() -> None:
    records = [record(f"train{i}", "a" if i < 9 else "b", "train", "") for i in range(12)]
    records += [record(f"test{i}", "a" if i < 12 else "b", "test") for i in range(15)]
    near = Pair("test1", "train1", "near", 0.75, "test", "train", "a", "a")
    inside = replace(near, path_a="train2")
    warnings = data_warnings(
        records,
        splits([r.path for r in records[:12]], [r.path for r in records[12:]], clean_test=["test0"] * 11,
               straddling_twins=["test3", "test4"], straddling_patients=["p1"], conflicting=["x"]),
        [near, inside, replace(near, kind="identical", path_a="test3")],
    )  # fmt: skip
    assert [sentence.split(":")[0].split(";")[0] for sentence in warnings] == [
        "2 of 15 test images are also in train. The clean test set excludes 4 images and is more reliable.",
        "1 pair has nearly the same image in train and in test, such as neighbouring frames of one patient. "
        "The clean test set includes them.",
        "1 patient has images in train and in test.",
        "12 of 27 images have no known patient, so a patient may be in train and in test.",
        "1 image has a duplicate with another label. Training excludes such images",
        "Unequal classes in train",
        "Unequal classes in test",
        "Tiny classes in test, with unreliable recall",
    ]
    assert "9 images of 'a', 3 of 'b'" in warnings[5] and warnings[7].endswith("'b' (3).")


def test_a_rung_that_depends_on_the_class_is_warned_about() -> None:
    lines = [{"label": "normal", "chosen": "0.06", "relaxed": "0.94"},
             {"label": "nodule", "chosen": "0.95", "relaxed": "0.05"}]  # fmt: skip
    end = "so the rung can reveal the class."
    assert mask_warnings(lines) == [
        f"'chosen' made 95 % of the masks of 'nodule' and 6 % of 'normal', {end}",
        f"'relaxed' made 94 % of the masks of 'normal' and 5 % of 'nodule', {end}",
    ]
    assert mask_warnings([{"label": "a", "chosen": 0.9}, {"label": "b", "chosen": 0.7}]) == []


def test_published_numbers_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text("dataset,method,percent_of_train,accuracy_percent\nbrain,CoOp,5,71.2\n")
    assert read_published(path) == [Published("brain", "CoOp", 5.0, 71.2)]
    path.write_text("method,dataset,percent,accuracy\nCoOp,brain,5,71.2\n")
    assert read_published(path) == [Published("brain", "CoOp", 5.0, 71.2)]
    path.write_text("dataset,method,percent,accuracy\nbrain,CoOp,5,712\n")
    with pytest.raises(ValueError, match=r"published.csv, line 2: 5 % of train and an accuracy of 712 %"):
        read_published(path)
    path.write_text("dataset,method,percent,accuracy\nbrain,CoOp,5,\n")
    with pytest.raises(ValueError, match=r"line 2: nan % of train"):
        read_published(path)
    path.write_text("dataset,method,score\n")
    with pytest.raises(ValueError, match=r"its columns are dataset, method, score; give dataset,method,"):
        read_published(path)


def test_the_plot_table_has_a_line_for_every_system_and_percent() -> None:
    assert plot_table(ROWS).splitlines() == [
        "test_set,system,percent_of_train,accuracy",
        *(f'"brain_mri, official",{line}' for line in (
            "clip,5,51.0000", "clip,100,61.0000", "ours,5,71.0000", "ours,100,73.0000", "pixels,5,41.0000",
            "pixels,100,73.0000", "zero,5,55.0000", "zero,100,55.0000", "ours (inverse),5,30.0000",
        )),
    ]  # fmt: skip


CURVES = [figures.Curve(name, (5.0, 50.0), (40.0 + 9 * i, 50.0 + 9 * i), (np.nan, 2.0))
          for i, name in enumerate("abc")]  # fmt: skip


def pixels(png: bytes) -> np.ndarray:
    """PNG bytes -> (H, W, 4) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def coloured(image: np.ndarray, colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int(((image[..., :3] == rgb).all(axis=2) & (image[..., 3] == 255)).sum())


def test_highlighted_systems_are_coloured_by_their_place_in_the_list_and_others_are_not() -> None:
    for ink in (figures.LIGHT, figures.DARK):
        drawn = pixels(figures.accuracy_panel(CURVES, ["elsewhere", "b"], ink))
        assert coloured(drawn, ink.lines[1]) > 500
        assert not any(coloured(drawn, line) > 50 for line in ink.lines[2:])
        assert drawn[0, 0, 3] == 0  # transparent


def test_the_panel_refuses_no_curve_and_more_highlighted_systems_than_colours() -> None:
    with pytest.raises(ValueError, match=r"no curve to draw\. Give the results of at least one system"):
        figures.accuracy_panel([], [], figures.LIGHT)
    with pytest.raises(ValueError, match=r"8 highlighted systems\. Give at most 7"):
        figures.accuracy_panel(CURVES, list("abcdefgh"), figures.LIGHT)


@given(st.lists(st.floats(0, 1), max_size=7))
def test_labels_do_not_overlap_keep_their_order_and_stay_in_the_panel(heights: list[float]) -> None:
    moved = figures.spread(heights, 0.1)
    order = np.argsort(heights, kind="stable")
    placed = np.array(moved)[order]
    assert (np.diff(placed) > 0.1 - 1e-9).all()
    assert not len(placed) or (placed.max() <= 1 + 1e-9 and placed.min() >= -1e-9)


def test_labels_that_do_not_overlap_are_not_moved() -> None:
    assert figures.spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]


def test_heat_is_coloured_at_the_attribution_and_grey_elsewhere() -> None:
    attribution = np.where(MASK, 2.0, -1.0)
    drawn = figures.attribution_overlay(IMAGE, attribution).astype(int)
    hot = np.ptp(drawn, axis=2) > 40
    assert np.array_equal(hot, MASK)
    assert (drawn[~MASK] == 120).all()
    blank = figures.attribution_overlay(IMAGE, np.zeros(MASK.shape))
    assert np.array_equal(blank, IMAGE)
