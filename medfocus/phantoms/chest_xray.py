"""Draw frontal chest radiographs with a nodule, a cavity, a consolidation or no finding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medfocus.phantoms.canvas import (
    View,
    blur,
    bump,
    cloud,
    ellipse,
    lobes,
    path,
    ragged,
    rod,
    stamp,
    step,
    strokes,
)
from medfocus.phantoms.phantom import Phantom

LABELS = ("normal", "nodule", "cavity", "consolidation")
TEXTS = ("PA ERECT", "AP SUPINE", "PORTABLE", "AP", "PA", "SITTING", "12:45", "120 KV")


def draw(label: str, rng: np.random.Generator, size: int) -> Phantom:
    """Draw a radiograph of a class of ``LABELS``; the patient's left is at the right."""
    zoom = rng.uniform(1.0, 1.25)
    view = View(
        size,
        turn=rng.normal(0, 0.04),
        zoom=(zoom * rng.uniform(0.92, 1.12), zoom * rng.uniform(0.94, 1.06)),
        shift=(rng.normal(0, 0.05), rng.normal(0.02, 0.05)),
    )
    x, y = view.grid()
    x = x + 0.010 * cloud(rng, size, 3)
    y = y + 0.010 * cloud(rng, size, 3)
    chest = build(rng, x, y)
    film = body(rng, view, chest, x, y)
    region, findings = np.zeros((size, size), bool), {"finding": "no finding"}
    if label != "normal":
        region, findings = add_lesion(film, label, rng, view, chest, x, y)
    add_devices(film, rng, view, x, y)
    image = develop(rng, film)
    burn_in(rng, image)
    return Phantom(image, region, "chest_xray", label, findings, parts(chest, x, y))


@dataclass(frozen=True)
class Chest:
    """The outlines of a chest in scene units (the lungs extend to about 0.65); arrays are (H, W)."""

    top: float  # y of the apices
    base: float  # y of the right dome of the diaphragm; high after a shallow breath
    wall: float  # soft tissue around the rib cage
    outer: np.ndarray  # half width of the rib cage in the row of the pixel
    inner: np.ndarray  # half width of mediastinum and heart in the row and on the side of the pixel
    below: np.ndarray  # distance below the diaphragm
    lung: np.ndarray  # distance into the lungs, positive inside


def build(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> Chest:
    """Choose the measures of a patient at random and return the outlines."""
    top, base, left_base = rng.uniform(-0.80, -0.70), rng.uniform(0.36, 0.58), rng.uniform(-0.01, 0.06)
    heart, aorta = rng.uniform(0.7, 1.3), rng.uniform(0.02, 0.09)
    u, left_side = np.abs(x), x > 0
    above = np.clip((0.15 - y) * (1 / (0.15 - top)), 0, 1.3)
    outer = rng.uniform(0.62, 0.72) * (1 - 0.36 * above * above - 0.05 * np.clip(y - 0.15, 0, 1))
    right = 0.02 * bump(y + 0.3, 0.5) + 0.09 * heart * bump(y - base + 0.15, 0.38)
    left = (
        aorta * bump(y + 0.30, 0.14) + 0.04 * bump(y + 0.08, 0.2) + 0.27 * heart * bump(y - base + 0.05, 0.56)
    )
    inner = np.where(left_side, left, right) + 0.10
    across, over = u - 0.30, u - 0.24
    below = y - base - left_base * left_side - 1.15 * across * across
    lung = np.minimum(outer - u, u - inner)
    lung = np.minimum(lung, np.minimum(y - top - 2.6 * over * over, -below))
    return Chest(top, base, rng.uniform(0.06, 0.16), outer, inner, below, lung)


def parts(chest: Chest, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return the lungs and the heart, name -> (H, W) bool."""
    lung = chest.lung > 0
    heart = (chest.inner > np.abs(x)) & (chest.below < 0) & (y > chest.base - 0.5)
    return {"right lung": lung & (x < 0), "left lung": lung & (x > 0), "heart": heart}


def body(rng: np.random.Generator, view: View, chest: Chest, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw the attenuation of the body (H, W): 0 for air, about 1 for the spine."""
    u, outer, below = np.abs(x), chest.outer, chest.below
    tilted = y + rng.normal(0, 0.04) * x  # shoulders are never level
    torso = np.minimum(outer + chest.wall + 0.05 * step(y - 0.4, 0.3) - u, y + 0.78)
    slope = rng.uniform(-0.12, 0.05)
    torso = np.maximum(torso, rod(u, tilted, (0.1, -0.86), (0.80, -0.70 - slope), 0.2))
    torso = np.maximum(torso, rod(u, tilted, (0.84, -0.70 - slope), (1.15 + rng.uniform(0, 0.3), 0.1), 0.18))
    torso = np.maximum(torso, 0.21 - u - np.clip(y + 0.75, 0, 1))  # neck
    soft = step(chest.lung, 0.018)
    air = 0.16 + 0.18 * np.sqrt(np.clip(chest.lung * 3.6, 0, 1))  # more where the lung is deep
    air -= vessels(rng, view)
    if rng.random() < 0.6:  # haze without an outline
        air -= rng.uniform(0.02, 0.06) * np.clip(cloud(rng, view.size, 3), -0.5, 1.5)
    film = 0.42 * step(torso, 0.02) + 0.14 * np.clip(torso * 5, 0, 1) - soft * air
    film += 0.11 * step(chest.inner + 0.01 - u, 0.06) * step(y + 0.75, 0.15)
    film += step(below, 0.02) * step(outer + 0.02 - u, 0.1) * (0.11 + 0.12 * np.clip(below * 3.3, 0, 1))
    film += 0.05 * bump(np.hypot((u - 0.17) * 1.3, y + 0.02 + 0.03 * np.sign(x)), 0.16)  # hila
    film -= 0.10 * bump(x - 0.01, 0.035) * step(-0.22 - y, 0.1)  # trachea
    add_ribs_and_spine(film, rng, chest, x, y)
    add_shoulders(film, rng, view, slope)
    add_gas(film, rng, view, chest, x, y)
    if rng.random() < 0.4:  # breasts
        reach = rng.uniform(0.25, 0.36)
        edge = ellipse(u, y, (rng.uniform(0.30, 0.42), 0.30), (reach, reach))
        film += rng.uniform(0.04, 0.11) * step(edge, 0.025) * np.clip(0.4 + edge / reach, 0, 1)
    return film


def add_ribs_and_spine(
    film: np.ndarray, rng: np.random.Generator, chest: Chest, x: np.ndarray, y: np.ndarray
) -> None:
    """Draw ribs as stripes along the posterior and anterior curves, and vertebrae with discs and pedicles."""
    u, strength, spacing = np.abs(x), rng.uniform(0.04, 0.12), rng.uniform(0.135, 0.165)
    tilt = rng.normal(0, 0.4) * x
    back = (
        (y - rng.uniform(0.9, 1.5) * (u - 0.16) ** 2 * (0.8 + 0.5 * y)) / spacing + rng.uniform(0, 1) + tilt
    )
    off = np.abs(back - np.round(back))
    ribs = (
        (0.6 * step(0.23 - off, 0.07) + 0.5 * bump(off - 0.22, 0.08))
        * (0.75 + 0.5 * u)
        * step(u - 0.05, 0.04)
    )
    front = (
        (y + rng.uniform(0.5, 0.8) * (u - 0.75) - 0.25 * u * u) / (spacing * 1.22) + rng.uniform(0, 1) + tilt
    )
    off = np.abs(front - np.round(front))
    ribs += 0.4 * step(0.2 - off, 0.09) * step(u - 0.3, 0.1) * step(y + 0.6, 0.1)
    outer = chest.outer
    cage = step(outer + 0.035 - u, 0.012) * step(y - chest.top + 0.02, 0.05)
    film += strength * cage * (ribs * step(0.75 - y, 0.25) + 0.7 * bump(outer + 0.015 - u, 0.03))
    middle = np.abs(x - 0.03 * rng.normal() * bump(y, 1.2))
    level = y / rng.uniform(0.12, 0.14) + rng.uniform(0, 1)
    off = np.abs(level - np.round(level))
    column = step(0.065 + 0.01 * y - middle, 0.012) * (1 - 0.45 * bump(off - 0.5, 0.12))
    film += rng.uniform(0.06, 0.14) * (column + 0.5 * bump(middle - 0.05, 0.02) * bump(off, 0.25))


def add_shoulders(film: np.ndarray, rng: np.random.Generator, view: View, slope: float) -> None:
    """Draw clavicles, shoulder blades and arms as wide pale bands with thin bright borders."""
    pixel = 2 / (view.size * view.zoom[0])
    wide, thin = [], []
    for side in (-1, 1):
        dy, lift = rng.normal(0, 0.012), rng.uniform(-0.07, 0.03) - slope
        clavicle = [
            (0.06, -0.58),
            (0.2, -0.63),
            (0.42, -0.71 + lift / 2),
            (0.6, -0.73 + lift),
            (0.78, -0.74 + lift),
        ]
        x, y = path(np.array(clavicle), pixel)
        half = 0.022 + 0.010 * np.abs(np.linspace(-1, 1, len(x)))
        wide += [(side * x, y + dy, 0.09)]
        thin += [(side * x, y + dy - half, 0.05), (side * x, y + dy + half, 0.06)]
        blade = [(0.74, -0.66), (0.66, -0.45), (0.62, -0.2), (0.68, -0.08), (0.78, -0.3), (0.86, -0.55)]
        x, y = path(np.add(blade, (rng.normal(0, 0.03), 0)), pixel)
        thin += [(side * x, y, 0.055)]
        head = np.linspace(-2.2, 1.2, 60)
        arm = np.array([(0.86, -0.68 - slope), (0.95, -0.4), (1.15, 0.1)])
        x, y = path(arm, pixel)
        wide += [(side * (x + d), y, 0.09) for d in (-0.03, 0.0, 0.03)]
        thin += [(side * (x + d), y, 0.08) for d in (-0.06, 0.06)]
        thin += [(side * (0.86 + 0.085 * np.cos(head)), -0.68 - slope + 0.085 * np.sin(head), 0.06)]
    for lines, width in ((wide, 2.6), (thin, 0.8)):
        xs, ys = (np.concatenate([line[k] for line in lines]) for k in (0, 1))
        weights = np.concatenate([np.full(len(line[0]), line[2]) for line in lines])
        film += strokes(view, xs, ys, weights, width * view.size / 192)


def add_gas(
    film: np.ndarray, rng: np.random.Generator, view: View, chest: Chest, x: np.ndarray, y: np.ndarray
) -> None:
    """Draw the stomach bubble with its fluid level and loops of bowel below the diaphragm."""
    if rng.random() < 0.7:
        at = (rng.uniform(0.22, 0.42), chest.base + rng.uniform(0.14, 0.20))
        box = view.box(at, 0.2)
        bubble = ellipse(x[box], y[box], at, (rng.uniform(0.08, 0.17), rng.uniform(0.05, 0.1)))
        film[box] -= rng.uniform(0.08, 0.2) * step(np.minimum(bubble, at[1] + 0.02 - y[box]), 0.015)
    for _ in range(rng.integers(0, 7)):
        at = (rng.uniform(-0.55, 0.55), chest.base + rng.uniform(0.28, 0.6))
        box = view.box(at, 0.12)
        radii = (rng.uniform(0.04, 0.1), rng.uniform(0.03, 0.08))
        loop = ellipse(x[box], y[box], at, radii, rng.uniform(0, 3))
        film[box] -= rng.uniform(0.03, 0.12) * (step(loop, 0.03) - 0.5 * bump(loop, 0.03))


def vessels(rng: np.random.Generator, view: View) -> np.ndarray:
    """Draw the vessels of both lungs: trees from the hila, thinner and fainter with every branching."""
    pixel = 2 / (view.size * view.zoom[0])
    film = np.zeros((view.size, view.size))
    strength = rng.uniform(0.04, 0.10)
    trunks = 16
    side = np.repeat((-1.0, 1.0), trunks // 2)
    x, y = side * rng.uniform(0.12, 0.18, trunks), rng.uniform(-0.1, 0.08, trunks)
    heading = np.tile(np.linspace(-1.35, 1.4, trunks // 2), 2) + rng.normal(0, 0.12, trunks)  # 0 is lateral
    length = rng.uniform(0.16, 0.30, trunks)
    for width in (1.2, 0.85, 0.65, 0.55):
        count = max(int(np.max(length) / (pixel * width * 1.6)), 3)
        t = np.linspace(0, 1, count)[None, :]
        angle = (
            heading[:, None] + rng.normal(0, 0.4, (len(x), 1)) * t + 0.15 * np.sin(7 * t + heading[:, None])
        )
        pace = length[:, None] / count
        xs = x[:, None] + np.cumsum(side[:, None] * np.cos(angle), 1) * pace
        ys = y[:, None] + np.cumsum(np.sin(angle), 1) * pace
        weights = strength * pace / pixel * (1 - 0.3 * t)
        film += strokes(view, xs.ravel(), ys.ravel(), weights.ravel(), width * view.size / 192)
        # Three children per vessel: two at its end, one at its middle.
        at = np.repeat((count - 1, count - 1, count // 2), len(x))
        parent = np.tile(np.arange(len(x)), 3)
        x, y, side = xs[parent, at], ys[parent, at], side[parent]
        fork = np.repeat((-0.45, 0.40, 0.75), len(parent) // 3) * rng.choice((-1, 1), len(parent))
        heading = angle[parent, at] + fork + rng.normal(0, 0.15, len(parent))
        length = length[parent] * rng.uniform(0.5, 0.9, len(parent))
        strength *= 0.8
    return film


def add_lesion(
    film: np.ndarray,
    label: str,
    rng: np.random.Generator,
    view: View,
    chest: Chest,
    x: np.ndarray,
    y: np.ndarray,
) -> tuple[np.ndarray, dict[str, str]]:
    """Draw a finding in a lung; return its region (H, W) bool and its findings."""
    size = view.size
    area = np.exp(rng.uniform(np.log(0.015), np.log(0.06)))
    radius = float(np.sqrt(4 * area / np.pi / (view.zoom[0] * view.zoom[1])))
    place = int(rng.choice(np.flatnonzero(chest.lung > min(0.6 * radius, 0.9 * chest.lung.max()))))
    cx, cy = float(x.flat[place]), float(y.flat[place])
    box = view.box((cx, cy), 1.7 * radius)
    x, y, air = x[box], y[box], step(chest.lung[box], 0.018)
    stretch = rng.uniform(0.85, 1.18)
    radii = (radius * stretch, radius / stretch)
    waves = {"nodule": (0.05, 0.03, 0.02), "cavity": (0.07, 0.05, 0.04)}
    outline = ragged(x, y, (cx, cy), radii, lobes(rng, waves.get(label, (0.16, 0.12, 0.08, 0.06))))
    if label == "consolidation":
        outline += (0.10 * cloud(rng, size, 13) + 0.05 * cloud(rng, size, 28))[box]
    shape = step((1 - outline) * radius, 0.035 if label == "consolidation" else 0.018) * air
    strength = rng.uniform(0.14, 0.26)
    if label == "nodule":
        share = strength * shape * (0.75 + 0.35 * np.sqrt(np.clip(1 - outline, 0, 1)))
    elif label == "cavity":
        centre = (cx + rng.normal(0, 0.05) * radius, cy + rng.normal(0, 0.05) * radius)
        hole = ragged(x, y, centre, radii, lobes(rng, (0.1, 0.08, 0.06)))
        hole = step((1 - rng.uniform(0.2, 0.36) - hole) * radius, 0.018)
        if rng.random() < 0.4:  # a fluid level
            hole *= step(cy + rng.uniform(0.1, 0.5) * radius - y, 0.012)
        share = shape * (strength * 1.15 * (1 - hole) - 0.07 * hole)
    else:
        patches = 0.95 + (0.35 * cloud(rng, size, 15) + 0.3 * cloud(rng, size, 34))[box]
        share = (
            strength
            * 1.2
            * shape
            * np.clip(patches, 0.35, 1.5)
            * (1 - 0.45 * bronchi(rng, view, (cx, cy), radius)[box])
        )
    film[box] += share
    region = np.zeros((size, size), bool)
    region[box] = (outline < 1) & (chest.lung[box] > 0)
    name = "left" if cx > 0 else "right"
    third = "upper" if cy < -0.3 else "middle" if cy < 0.08 else "lower"
    extent = "small" if region.mean() < 0.022 else "medium" if region.mean() < 0.037 else "large"
    return region, {"finding": label, "side": name, "region": f"{name} {third} lung", "size": extent}


def bronchi(rng: np.random.Generator, view: View, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Draw air bronchograms in a consolidation: streaks towards the hilum, 0 to 1 (H, W)."""
    pixel = 2 / (view.size * view.zoom[0])
    along = np.arange(-0.8, 0.7, 1.2 * pixel / radius) * radius
    angle = (
        np.arctan2(centre[1] + 0.02, centre[0])
        + rng.normal(0, 0.3, (3, 1))
        + rng.normal(0, 0.5, (3, 1)) * along
    )
    off = np.linspace(-0.4, 0.4, 3)[:, None] * radius + rng.normal(0, 1.5, (3, 1)) * along * along
    xs = centre[0] + along * np.cos(angle) - off * np.sin(angle)
    ys = centre[1] + along * np.sin(angle) + off * np.cos(angle)
    return np.clip(strokes(view, xs.ravel(), ys.ravel(), np.full(xs.size, 1.2), view.size / 192), 0, 1)


def add_devices(film: np.ndarray, rng: np.random.Generator, view: View, x: np.ndarray, y: np.ndarray) -> None:
    """Draw devices on and in the patient and shadows that mimic findings, independently of the class."""
    pixel = 2 / (view.size * view.zoom[0])
    discs, wires = [], []  # (centre, radius, height, hollow), (points, height)
    for _ in range(rng.integers(0, 4)):  # vessels in cross section
        at = (rng.choice((-1, 1)) * rng.uniform(0.16, 0.36), rng.uniform(-0.22, 0.22))
        discs.append((at, rng.uniform(0.016, 0.03), rng.uniform(0.08, 0.16), 0))
    if rng.random() < 0.3:  # nipples
        at, low, radius = rng.uniform(0.32, 0.46), rng.uniform(0.22, 0.38), rng.uniform(0.025, 0.045)
        discs += [((side * at, low + rng.normal(0, 0.01)), radius, 0.07, 0) for side in (-1, 1)]
    if rng.random() < 0.35:  # electrodes with their wires
        exit_x = rng.uniform(-0.7, 0.7)
        for _ in range(rng.integers(2, 5)):
            at = (rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.5))
            discs.append((at, rng.uniform(0.028, 0.05), rng.uniform(0.1, 0.3), rng.uniform(0, 1)))
            bend = (at[0] + rng.uniform(-0.25, 0.25), at[1] + rng.uniform(0.15, 0.35))
            wires.append(
                ([at, bend, (exit_x + rng.normal(0, 0.05), 0.8), (exit_x, 1.1)], rng.uniform(0.1, 0.3))
            )
    if rng.random() < 0.12:  # buttons
        discs += [((0.06, -0.5 + 0.3 * k), 0.025, 0.12, 0.5) for k in range(4)]
    if rng.random() < 0.12:  # a pacemaker and its lead
        side = rng.choice((-1, 1))
        at = (side * rng.uniform(0.42, 0.5), rng.uniform(-0.5, -0.38))
        box = view.box(at, 0.15)
        film[box] += 0.3 * step(
            (1 - ragged(x[box], y[box], at, (0.1, 0.085), np.array([0, 0, 0.06]))) * 0.08, 0.01
        )
        wires.append(([at, (side * 0.3, -0.6), (-0.09, -0.45), (-0.1, 0), (-0.05, 0.3), (0.2, 0.36)], 0.3))
    if rng.random() < 0.2:  # a tube or a central line
        side, deep = rng.choice((-1, 1)), rng.uniform(-0.1, 0.15)
        wires.append(
            ([(side * 0.5, -1.1), (side * 0.3, -0.65), (-0.06, -0.45), (-0.09, -0.2), (-0.1, deep)], 0.2)
        )
    if rng.random() < 0.25:  # a fold of skin
        side = rng.choice((-1, 1))
        wires.append(([(side * 0.62, rng.uniform(-0.3, 0)), (side * 0.5, 0.2), (side * 0.42, 0.7)], 0.1))
    for at, radius, height, hollow in discs:
        box = view.box(at, radius)
        disc = ellipse(x[box], y[box], at, (radius, radius))
        film[box] += height * (step(disc, 0.008) - hollow * step(disc - 0.4 * radius, 0.008))
    if wires:
        curves = [path(np.array(points), pixel) for points, _ in wires]
        xs, ys = (np.concatenate([curve[k] for curve in curves]) for k in (0, 1))
        heights = np.concatenate([np.full(len(c[0]), w[1]) for c, w in zip(curves, wires, strict=True)])
        film += strokes(view, xs, ys, heights, rng.uniform(0.55, 0.9) * view.size / 192)


def develop(rng: np.random.Generator, film: np.ndarray) -> np.ndarray:
    """Apply scatter, sharpening, grain, exposure and tone curve: film -> (H, W) uint8."""
    size = len(film)
    film = film + rng.uniform(0.005, 0.03) * cloud(rng, size, 2)
    if rng.random() < 0.5:
        film += rng.uniform(0.2, 0.6) * (film - blur(film, 4 * size / 192))
    if rng.random() < 0.4:
        film = blur(film, rng.uniform(0.4, 0.9) * size / 192)
    low, high = rng.uniform(-0.06, 0.14), rng.uniform(0.76, 1.02)
    film += rng.uniform(0.003, 0.02) * rng.standard_normal(film.shape)
    tone = np.clip((film - low) / (high - low), 0, 1) ** rng.uniform(0.7, 1.35)
    return np.round(tone * rng.uniform(205, 255) + rng.uniform(0, 12)).clip(0, 255).astype(np.uint8)


def burn_in(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw collimation, side marker and text in place."""
    size = len(image)
    for band in (image, image.T, image[::-1], image[:, ::-1].T):
        if rng.random() < 0.12:
            band[: int(rng.uniform(0.01, 0.07) * size)] = rng.integers(0, 12)
    if rng.random() < 0.65:
        corner = (rng.choice((0.03, 0.08, 0.84, 0.9)), rng.uniform(0.02, 0.2))
        scale = max(int(rng.uniform(1, 4) * size / 192), 1)
        stamp(image, "R" if corner[0] < 0.5 else "L", corner, scale, rng.uniform(230, 250))
    if rng.random() < 0.3:
        place = (rng.uniform(0.5, 0.9), rng.choice((0.01, 0.95)))
        stamp(image, str(rng.choice(TEXTS)), place, max(size // 192, 1), 240)
