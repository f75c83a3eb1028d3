"""Tables, CSV and figures of a study."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfocus.reports import controls, figures, tables
from medfocus.reports.rows import StudyRow, read_rows, write_results, write_study

COLUMNS = (
    "dataset,method,focus,percent_of_train,seed,accuracy,balanced_accuracy,macro_f1,auroc,ece,"
    "ece_uncalibrated,temperature,coverage,mean_set_size,test_set,n_train,n_test,mlflow_run_id"
)


def row(accuracy: float = 0.5, **changes: object) -> StudyRow:
    """Return a row of a study with changes."""
    usual = StudyRow(
        dataset="chest", method="pixels", focus="none", percent_of_train=5.0, seed=0, accuracy=accuracy,
        balanced_accuracy=0.4, macro_f1=0.3, auroc=0.7, ece=0.1, ece_uncalibrated=0.2, temperature=1.5,
        coverage=0.9, mean_set_size=1.25, test_set="official", n_train=9, n_test=66,
        mlflow_run_id="abc",
    )  # fmt: skip
    return replace(usual, **changes)  # type: ignore[arg-type]


def study() -> list[StudyRow]:
    """Return rows of two systems, two percents and three seeds."""
    return [
        row(round(0.5 + 0.1 * seed + 0.2 * (focus == "multiply"), 6), focus=focus, percent_of_train=percent,
            seed=seed, n_train=int(180 * percent / 100))
        for focus in ("none", "multiply")
        for percent in (5.0, 100.0)
        for seed in (0, 1, 2)
    ]  # fmt: skip


def image(png: bytes) -> np.ndarray:
    """PNG bytes -> (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_csv_has_the_documented_columns(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "study.csv"
    write_study([row(2 / 3, auroc=float("nan"))], path)
    assert path.read_text().splitlines()[0] == COLUMNS
    assert path.read_text().splitlines()[1].startswith("chest,pixels,none,5,0,0.6667,0.4000,0.3000,nan,")


def test_results_have_the_cell_key_in_place_of_the_run(tmp_path: Path) -> None:
    rows = [row(cell_key="f" * 64, mlflow_run_id="")]
    write_results(rows, tmp_path / "results.csv")
    columns = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert columns == COLUMNS.replace("mlflow_run_id", "cell_key")
    assert read_rows(tmp_path / "results.csv") == rows


def test_the_progress_line_has_mean_and_interval_at_every_percent() -> None:
    rows = [row(0.5, seed=0), row(0.7, seed=1), row(0.8, percent_of_train=100.0)]
    assert tables.progress_line(rows).split() == [
        *("chest", "pixels", "5%:", "60.0", "±", "127.1", "100%:", "80.0"),  # t(0.975, 1) * 0.1 is 1.271
    ]


def test_csv_reads_back_as_the_same_rows(tmp_path: Path) -> None:
    write_study(study(), tmp_path / "study.csv")
    assert read_rows(tmp_path / "study.csv") == study()


def test_equal_rows_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_study(study(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_table_gives_mean_and_half_width_of_the_draws_in_percent() -> None:
    # 50, 60, 70: mean 60, t(0.975, 2) * 10 / sqrt(3) = 24.84
    assert "60.0 ± 24.8" in tables.study_table(study())
    assert "80.0 ± 24.8" in tables.study_table(study())


def test_table_names_systems_by_method_and_focus_and_shows_the_support_sizes() -> None:
    lines = tables.study_table(study()).splitlines()
    assert "chest, official test set (66 images)" in lines[0]
    assert "over 3 draws" in lines[0]
    assert lines[2].split() == ["percent", "of", "train", "5%", "100%"]
    assert lines[3].split() == ["images", "9", "180"]
    assert [line.split("  ")[0] for line in lines[5:7]] == ["pixels", "pixels (multiply)"]


def test_table_has_a_block_for_every_data_set_and_test_set() -> None:
    rows = [row(), row(test_set="clean", n_test=50), row(dataset="brain")]
    text = tables.study_table(rows)
    assert [text.count(name) for name in ("chest, official", "chest, clean", "brain, official")] == [1, 1, 1]
    assert text.index("chest, official") < text.index("chest, clean") < text.index("brain")


def test_a_single_draw_has_no_interval_and_a_missing_cell_no_number() -> None:
    rows = [row(0.5), row(0.6, percent_of_train=10.0), row(0.7, method="clip", percent_of_train=10.0)]
    lines = tables.study_table(rows).splitlines()
    assert lines[0].endswith("one draw")
    assert lines[5].split() == ["pixels", "50.0", "60.0"]
    assert lines[6].split() == ["clip", "–", "70.0"]


def test_a_system_without_training_images_has_its_own_column_and_does_not_count_for_the_draws() -> None:
    zero_shot = row(0.4, method="zero-shot", percent_of_train=0.0, n_train=0)
    lines = tables.study_table([*study(), zero_shot]).splitlines()
    assert lines[0].endswith("over 3 draws; at 100 % every draw has the same images")
    assert lines[2].split()[3:] == ["0%", "5%", "100%"]
    assert lines[3].split() == ["images", "0", "9", "180"]
    assert lines[7].split() == ["zero-shot", "40.0", "–", "–"]


def test_a_system_without_training_images_is_a_horizontal_line_of_the_figure() -> None:
    zero_shot = row(0.2, method="zero-shot", percent_of_train=0.0, n_train=0)
    pixels = image(figures.accuracy_figure([*study(), zero_shot]))
    coloured = (pixels == [0xD5, 0x5E, 0x00]).all(axis=2)  # the third system's colour
    level = coloured.sum(axis=1).argmax()
    assert np.ptp(np.flatnonzero(coloured[level])) > 0.7 * pixels.shape[1]
    assert image(figures.accuracy_figure([zero_shot])).std() > 0  # also alone


def test_tables_show_another_metric_when_asked() -> None:
    assert "AUROC in %" in tables.study_table(study(), "auroc")
    assert "70.0 ± 0.0" in tables.study_table(study(), "auroc")


def test_markdown_has_the_numbers_of_the_plain_table() -> None:
    markdown = tables.markdown_table(study())
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows[1] == "|---|---:|---:|"
    assert rows[3] == "| pixels | 60.0 ± 24.8 | 60.0 ± 24.8 |"
    assert len({line.count("|") for line in rows}) == 1


def test_a_study_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="the study has no row; evaluate at least one cell"):
        tables.study_table([])


def test_equal_rows_give_the_same_accuracy_figure_and_other_rows_another() -> None:
    png = figures.accuracy_figure(study())
    assert png == figures.accuracy_figure(study())
    assert png != figures.accuracy_figure([replace(r, accuracy=r.accuracy / 2) for r in study()])


def test_accuracy_figure_has_a_panel_for_every_data_set() -> None:
    one = image(figures.accuracy_figure(study()))
    two = image(figures.accuracy_figure([*study(), *(replace(r, dataset="brain") for r in study())]))
    four = image(figures.accuracy_figure([replace(r, dataset=d) for d in "abcd" for r in study()]))
    assert one.shape[1] < two.shape[1] < four.shape[1]
    assert four.shape[0] > 1.5 * two.shape[0]


def test_accuracy_figure_accepts_single_draws_and_more_systems_than_colours() -> None:
    rows = [
        row(0.5 + i / 40, method=f"method-{i}", percent_of_train=p) for i in range(12) for p in (5.0, 50.0)
    ]
    assert image(figures.accuracy_figure(rows)).std() > 0


def test_figures_contain_no_time_and_no_version() -> None:
    for png in (figures.accuracy_figure(study()), figures.confusion_figure(np.eye(2, dtype=int), ["a", "b"])):
        with Image.open(io.BytesIO(png)) as image:
            assert "Software" not in image.info
            assert not any("time" in key.lower() or "date" in key.lower() for key in map(str, image.info))


def test_figures_leave_pyplot_unchanged() -> None:
    figures.accuracy_figure(study())
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_confusion_figure_colours_by_the_share_of_the_true_class() -> None:
    # 1 of 1 correct is as dark as 100 of 100 correct; the off-diagonal cells are equally light.
    pixels = image(figures.confusion_figure(np.array([[1, 0], [0, 100]]), ["a", "b"]))
    dark = (pixels == [8, 48, 107]).all(axis=2)  # the last colour of matplotlib's Blues
    light = (pixels == [247, 251, 255]).all(axis=2)  # and its first colour
    assert abs(dark.sum() - light.sum()) < 0.05 * dark.sum()
    assert dark.mean() > 0.2


def test_confusion_figure_refuses_counts_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"counts are \(2, 2\) for 3 classes; give \(3, 3\)"):
        figures.confusion_figure(np.eye(2, dtype=int), ["a", "b", "c"])


def test_mask_sheet_draws_only_the_contour() -> None:
    grey = np.full((120, 160, 3), 90, dtype=np.uint8)
    region = np.zeros((120, 160), dtype=bool)
    region[30:90, 40:120] = True
    bare = image(figures.mask_sheet([grey], [np.zeros_like(region)], ["covid"]))
    drawn = image(figures.mask_sheet([grey], [region], ["covid"]))
    changed = (bare != drawn).any(axis=2)
    orange = (drawn == figures._CONTOUR).all(axis=2)
    assert np.array_equal(changed, orange)
    # The region's rim at the tile's scale, 2 pixels wide: 2 * 2 * (80 + 60) * 176 / 160.
    assert orange.sum() == pytest.approx(4 * (80 + 60) * 176 / 160, rel=0.05)


def test_mask_sheet_accepts_images_of_any_size() -> None:
    images = [np.zeros((h, w, 3), dtype=np.uint8) for h, w in ((10, 300), (300, 10), (7, 7))]
    sheet = figures.mask_sheet(images, [np.ones(p.shape[:2], dtype=bool) for p in images], ["a", "b", "c"])
    assert sheet == figures.mask_sheet(
        images, [np.ones(p.shape[:2], dtype=bool) for p in images], ["a", "b", "c"]
    )
    assert image(sheet).shape[1] > 3 * 176


def test_report_and_tracking_import_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, medfocus.reports.tables, medfocus.tracking.runs; "
        "print('torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_gain_of_a_focus_is_paired_by_draw() -> None:
    """Draws differ by far more than the gain, but the paired interval has no width."""
    gain = tables.gain(study(), "accuracy", "pixels", "multiply", 5.0)
    assert gain is not None and gain.draws == 3
    assert (gain.mean, gain.half_width) == pytest.approx((20, 0), abs=1e-6)
    unpaired = [r for r in study() if not (r.focus == "multiply" and r.seed == 1)]
    gain = tables.gain(unpaired, "accuracy", "pixels", "multiply", 5.0)
    assert gain is not None and gain.draws == 2
    assert tables.gain(study(), "accuracy", "pixels", "blur", 5.0) is None


def test_the_table_shows_the_gain_of_a_focus_with_its_sign() -> None:
    lines = tables.study_table(study()).splitlines()
    assert lines[-1].split() == ["pixels:", "multiply", "-", "none", "+20.0", "±", "0.0", "+20.0", "±", "0.0"]
    worse = [replace(r, accuracy=r.accuracy - 0.3) if r.focus == "multiply" else r for r in study()]
    assert "-10.0 ± 0.0" in tables.markdown_table(worse)


FOCUS = {0: 80.0, 1: 82.0, 2: 81.0}  # draw -> accuracy in %


def lower(by: float) -> dict[int, float]:
    """Return accuracies that are below the focus by nearly the same amount in every draw."""
    return {draw: value - by - 0.1 * draw for draw, value in FOCUS.items()}


def test_the_region_carries_the_class_if_every_control_is_below_the_focus() -> None:
    sentence = controls.verdict(FOCUS, {"shuffled": lower(40), "inverse": lower(20)}, {})
    assert sentence == (
        "every control is below the focus (inverse -20.1 ± 0.2, shuffled -40.1 ± 0.2): the region carries it"
    )


def test_the_data_set_is_confounded_if_the_background_is_not_below_the_focus() -> None:
    sentence = controls.verdict(FOCUS, {"inverse": {0: 81.0, 1: 81.0, 2: 80.0}, "shuffled": lower(40)}, {})
    assert sentence == (
        "background alone is not significantly below the focus (-0.3 ± 2.9): take the data set as confounded"
    )


def test_every_control_that_is_not_below_the_focus_is_named() -> None:
    sentence = controls.verdict(FOCUS, {"shuffled": FOCUS, "center-box": FOCUS, "inverse": lower(-5)}, {})
    assert sentence is not None and sentence.split("; ") == [
        "background alone is not significantly below the focus (+4.9 ± 0.2): take the data set as confounded",
        "another image's mask is not significantly below the focus (+0.0 ± 0.0): "
        "the mask's content does not matter",
        "the centre box is not significantly below the focus (+0.0 ± 0.0): a segmentation is not needed",
    ]


def test_two_different_draws_are_too_few_for_a_verdict_and_the_interval_shows_it() -> None:
    sentence = controls.verdict({0: 80.0, 1: 80.0}, {"inverse": {0: 30.0, 1: 50.0}}, {})
    assert sentence is not None and "(-40.0 ± 127.1): take the data set as confounded" in sentence


def test_the_verdict_is_paired_by_draw() -> None:
    """The draws differ by far more than the control and the focus."""
    focus = {0: 30.0, 1: 60.0, 2: 90.0}
    sentence = controls.verdict(focus, {"inverse": {2: 85.0, 0: 25.1, 1: 55.0, 7: 99.0}}, {})
    assert sentence == "every control is below the focus (inverse -5.0 ± 0.1): the region carries it"


def test_the_verdict_says_that_the_whole_image_is_above_the_focus() -> None:
    sentence = controls.verdict(FOCUS, {"inverse": lower(20)}, lower(-6))
    assert sentence is not None and sentence.endswith(
        "the region carries it; the whole image is above the focus (+5.9 ± 0.2)"
    )


def test_without_a_control_in_two_draws_there_is_no_verdict() -> None:
    assert controls.verdict(FOCUS, {}, FOCUS) is None
    assert controls.verdict(FOCUS, {"inverse": {0: 10.0}}, FOCUS) is None
    assert controls.verdict({}, {"inverse": FOCUS}, FOCUS) is None


def controlled(**losses: float) -> list[StudyRow]:
    """Return the study with controls that score lower than its focus by the given losses."""
    focused = [r for r in study() if r.focus == "multiply"]
    return study() + [
        replace(r, focus=name.replace("_", "-"), accuracy=r.accuracy - loss - r.seed / 100)
        for name, loss in losses.items()
        for r in focused
    ]


def test_the_tables_end_with_the_verdict_on_the_controls() -> None:
    rows = controlled(inverse=0.3, shuffled=0.4)
    sentence = (
        "Controls of pixels (multiply), accuracy at 5 % of train, 3 draws: every control is below the focus "
        "(inverse -31.0 ± 2.5, shuffled -41.0 ± 2.5): the region carries it."
    )
    assert tables.study_table(rows).splitlines()[-2:] == ["", sentence]
    assert tables.markdown_table(rows).splitlines()[-2:] == ["", sentence]
    assert "confounded" in tables.study_table(controlled(inverse=-0.01, shuffled=0.4))


def test_each_focus_has_a_verdict_from_its_own_controls() -> None:
    crops = {"dual-crop": 0.0, "shuffled-crop": 0.3, "center-crop": 0.2}
    extra = [replace(r, focus=name, accuracy=r.accuracy - loss - r.seed / 100)
             for name, loss in crops.items() for r in study() if r.focus == "multiply"]  # fmt: skip
    last = tables.study_table(controlled(inverse=-0.01) + extra).splitlines()[-3::2]
    assert last[0].startswith("Controls of pixels (multiply)") and "confounded" in last[0]
    assert last[1].startswith("Controls of pixels (dual-crop)") and last[1].endswith("the region carries it.")


def test_the_verdict_takes_each_draw_once_over_the_percents_and_leaves_out_100() -> None:
    rows = controlled(center_box=0.2)
    ten = [replace(r, percent_of_train=10.0, accuracy=r.accuracy - (r.focus != "multiply") * 0.1)
           for r in rows if r.percent_of_train == 5]  # fmt: skip
    full = [replace(r, accuracy=0.9) if r.percent_of_train == 100 else r for r in rows]
    text = tables.study_table(full + ten)
    assert (
        "accuracy at 5 to 10 % of train, 3 draws: every control is below the focus (center-box -26.0" in text
    )


def test_without_controls_or_with_one_draw_the_tables_have_no_verdict() -> None:
    assert "Controls" not in tables.study_table(study())
    one = [r for r in controlled(inverse=0.3) if r.seed == 0]
    assert "Controls" not in tables.study_table(one)
    assert "Controls" not in tables.study_table([r for r in one if r.focus != "multiply"])


def test_the_verdict_knows_every_control() -> None:
    from medfocus.focus.controls import CONTROLS

    assert set(controls.CONTROLS) == set(CONTROLS)
    for focus, names in controls.CONTROLLED.items():
        assert {CONTROLS[name].mode for name in names} <= {focus, "inverse"}
