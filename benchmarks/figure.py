"""Draw the figure of the README: image, mask, what CLIP sees, answer; one held-out phantom a row.

    python -m benchmarks.figure --out docs/figure.png

The model of each row learns from eight phantoms of each class. No label is given to the mask.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from medfocus import MedFocusCLIP, phantoms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = {"chest_xray": "cavity", "brain_mri": "meningioma", "breast_ultrasound": "malignant"}
TITLES = ("image", "mask (SAM2, no label)", "what CLIP sees (crop)", "answer")
SUPPORT = 8  # training images of each class


def draw_row(axes: list[Axes], folder: Path, modality: str, label: str) -> None:
    """Fit on drawn images of a modality and draw one test image of ``label``."""
    phantoms.write(folder, modality, seed=0, train_per_class=SUPPORT, test_per_class=1)
    train = sorted((folder / "train").rglob("*.png"))
    (test,) = (folder / "test" / label).iterdir()
    model = MedFocusCLIP(focus="crop", modality=modality).fit(train, [path.parent.name for path in train])
    explanation = model.explain(test)
    image = np.asarray(Image.open(test).convert("L"))
    axes[0].imshow(image, cmap="gray", vmin=0, vmax=255)
    axes[1].imshow(image, cmap="gray", vmin=0, vmax=255)
    axes[1].contourf(explanation.mask, levels=[0.5, 1.5], colors="#ff8c00", alpha=0.35)
    axes[1].contour(explanation.mask, levels=[0.5], colors="#ff8c00", linewidths=1.5)
    axes[2].imshow(explanation.focus)
    for panel in axes[:3]:
        panel.set_axis_off()
    axes[0].text(0.03, 0.04, label, transform=axes[0].transAxes, color="white", fontsize=8)
    draw_answer(axes[3], list(model.classes_), model.predict_proba([test])[0], label)


def draw_answer(panel: Axes, classes: list[str], probabilities: np.ndarray, label: str) -> None:
    """Draw one bar a class; the bar of the true class is orange."""
    colours = ["#ff8c00" if name == label else "#8c959f" for name in classes]
    panel.barh(classes, probabilities, color=colours, height=0.6)
    for row, value in enumerate(probabilities):
        panel.text(value + 0.02, row, f"{value:.0%}", va="center", fontsize=8)
    panel.set_xlim(0, 1.18)
    panel.invert_yaxis()
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0, labelsize=8)
    for side in panel.spines.values():
        side.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/figure.png"))
    args = parser.parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6.4), dpi=110, layout="constrained")
    panels = figure.subplots(len(ROWS), len(TITLES), width_ratios=(1, 1, 1, 1.1))
    for panel, title in zip(panels[0], TITLES, strict=True):
        panel.set_title(title, fontsize=10)
    with TemporaryDirectory() as folder:
        for axes, (modality, label) in zip(panels, ROWS.items(), strict=True):
            draw_row(list(axes), Path(folder, modality), modality, label)
    figure.savefig(args.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
