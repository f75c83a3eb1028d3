"""The sentences that a study's page begins with: what the rows of a test set say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from medfocus.evaluation.comparison import CurvePoint, Difference
from medfocus.evaluation.metrics import Interval
from medfocus.reports.controls import CONTROLS, control_verdicts
from medfocus.reports.rows import StudyRow, intervals_of

LEVEL = 0.05  # adjusted p below which a difference is called one


def verdict_sentences(
    block: Sequence[StudyRow], baseline: str = "", differences: Mapping[CurvePoint, Difference] | None = None
) -> list[str]:
    """What the rows of one test set say: the best systems, their lead on the baseline, and the controls."""
    controls = {row.system for row in block if row.focus in CONTROLS}  # of which none can be the best
    intervals = {cell: i for cell, i in intervals_of(block, "accuracy").items() if cell[0] not in controls}
    percents = sorted({percent for _, percent in intervals if percent > 0})
    levels = {system: i.mean for (system, percent), i in intervals.items() if percent == 0}
    said, wins = [], _winners(intervals, percents)
    if wins:
        parts = [
            f"{system} at {_percents(won)} ({span([intervals[system, p].mean for p in won])} %)"
            for system, won in wins.items()
        ]
        said.append(f"Highest accuracy: {'; '.join(parts)}.")
    if levels:
        top = max(levels, key=levels.__getitem__)
        over = sorted(p for s, won in wins.items() for p in won if levels[top] > intervals[s, p].mean)
        where = f", above every fitted system at {_percents(over)}" if over else ""
        if over or not wins:
            said.append(f"{top} needs no training image and scores {levels[top]:.1f} %{where}.")
    if differences:
        known = [d for d in differences.values() if d.adjusted_p < LEVEL]
        above, below = (sum(sign * d.mean > 0 for d in known) for sign in (1, -1))
        verb = "is" if above == 1 else "are"
        said.append(
            f"Of {len(differences)} differences to {baseline}, {above} {verb} above and {below} below it "
            f"at an adjusted p below {LEVEL}.{_lead(wins, differences, baseline)}"
        )
    return [*said, *control_verdicts(block)]


def _lead(
    wins: Mapping[str, Sequence[float]], differences: Mapping[CurvePoint, Difference], baseline: str
) -> str:
    """A sentence on the system that wins most often, at the largest percent where it does."""
    cell = next(((system, max(won)) for system, won in wins.items()), None)
    if cell is None or cell not in differences:
        return ""
    lead = differences[cell]
    return (
        f" At {cell[1]:.4g} % of train {cell[0]} differs from {baseline} by {points(lead.mean)} points "
        f"(95 % interval {points(lead.low)} to {points(lead.high)}, adjusted p {p_value(lead.adjusted_p)})."
    )


def _winners(intervals: Mapping[CurvePoint, Interval], percents: Iterable[float]) -> dict[str, list[float]]:
    """System -> the percents at which it is best, the one with the most first."""
    won: dict[str, list[float]] = {}
    for percent in percents:
        means = {system: interval.mean for (system, p), interval in intervals.items() if p == percent}
        won.setdefault(max(means, key=means.__getitem__), []).append(percent)
    return dict(sorted(won.items(), key=lambda item: -len(item[1])))


def points(share: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    """A p-value with its relation: "= 0.012" or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def span(values: Sequence[float]) -> str:
    """From the least to the greatest value, with one decimal."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _percents(percents: Sequence[float]) -> str:
    words = [f"{percent:.4g}" for percent in percents]
    return f"{' and '.join([', '.join(words[:-1]), words[-1]] if len(words) > 1 else words)} % of train"
