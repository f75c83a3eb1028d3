"""Verdicts on a focus from its controls: the background, another image's mask, the centre box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medfocus.reports.rows import StudyRow, paired, percent_text, signed_text

_OTHER = "another image's mask is not significantly below the focus {}: the mask's content does not matter"
_CENTER = "the centre box is not significantly below the focus {}: a segmentation is not needed"
# Focus -> its controls -> the finding if a control does not score below the focus.
CONTROLLED = {
    "multiply": {
        "inverse": "background alone is not significantly below the focus {}: "
        "take the data set as confounded",
        "shuffled": _OTHER,
        "center-box": _CENTER,
    },
    "dual-crop": {"shuffled-crop": _OTHER, "center-crop": _CENTER},
}
FINDINGS = {name: finding for controls in CONTROLLED.values() for name, finding in controls.items()}
CONTROLS = tuple(FINDINGS)


def verdict(
    focus: Mapping[int, float], controls: Mapping[str, Mapping[int, float]], none: Mapping[int, float]
) -> str | None:
    """Return a sentence on a focus and its controls, or None if no control shares two draws with the focus.

    A control is below the focus if the 95 % t-interval of its difference, paired by draw, lies below 0. The
    sentence shows the intervals, because a wide interval means too few draws. If the focus itself is at
    chance level, the verdict is meaningless; this function does not know the level.

    Args:
        focus: Draw -> accuracy in %.
        controls: Name of a control, see ``CONTROLLED`` -> draw -> accuracy in %.
        none: Draw -> accuracy in % of the whole image; empty if it was not run.
    """
    differences = ((name, paired(controls[name], focus)) for name in FINDINGS if name in controls)
    known = {name: interval for name, interval in differences if interval is not None and interval.draws > 1}
    if not known:
        return None
    findings = [
        FINDINGS[name].format(f"({signed_text(interval)})")
        for name, interval in known.items()
        if interval.mean + interval.half_width >= 0
    ]
    if not findings:
        below = ", ".join(f"{name} {signed_text(interval)}" for name, interval in known.items())
        findings = [f"every control is below the focus ({below}): the region carries it"]
    lost = paired(none, focus)
    if lost is not None and lost.mean - lost.half_width > 0:
        findings.append(f"the whole image is above the focus ({signed_text(lost)})")
    return "; ".join(findings)


def control_verdicts(block: Sequence[StudyRow]) -> list[str]:
    """Return the verdict on each focus, by accuracy, for each method that was run with controls.

    Every draw counts once, with its mean over the percents, because its supports are nested. 0 % and 100 %
    are excluded, because there all draws have the same images.
    """
    pairs = [(m, focus) for m in dict.fromkeys(row.method for row in block) for focus in CONTROLLED]
    return [line for method, focus in pairs if (line := _control_verdict(block, method, focus))]


def _control_verdict(block: Sequence[StudyRow], method: str, focus: str) -> str:
    """Return the verdict on one focus of one method; "" without controls."""
    draws, percents = accuracies(block, method, focus)
    controls = {name: of_draw for name, of_draw in draws.items() if name in CONTROLLED[focus]}
    sentence = verdict(draws.get(focus, {}), controls, draws.get("none", {}))
    if sentence is None:
        return ""
    span = " to ".join(dict.fromkeys(percent_text(p) for p in (percents[0], percents[-1])))
    where = f"accuracy at {span} % of train, {len(draws[focus])} draws"
    return f"Controls of {method} ({focus}), {where}: {sentence}."


def accuracies(
    block: Sequence[StudyRow], method: str, focus: str
) -> tuple[dict[str, dict[int, float]], list[float]]:
    """Return the accuracies in % that ``verdict`` compares, and the percents of train behind them.

    The accuracies are those of a focus, of its controls and of "none", by draw; each is the mean over the
    percents between 0 and 100 at which all of them were run.
    """
    cells: dict[str, dict[tuple[int, float], float]] = {}  # focus -> (draw, percent) -> accuracy in %
    for row in block:
        concerned = row.method == method and row.focus in (focus, "none", *CONTROLLED[focus])
        if concerned and 0 < row.percent_of_train < 100:
            cells.setdefault(row.focus, {})[row.seed, row.percent_of_train] = 100 * row.accuracy
    common = sorted(set.intersection(*map(set, cells.values()))) if cells else []
    draws = {
        name: {draw: float(np.mean([at[key] for key in common if key[0] == draw])) for draw, _ in common}
        for name, at in cells.items()
    }
    return draws, sorted({percent for _, percent in common})
