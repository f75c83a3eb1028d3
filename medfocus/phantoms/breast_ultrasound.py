"""Draw breast ultrasound frames with a benign mass, a malignant mass or a cyst.

Brightness is the logarithm of the echo, as a scanner displays it. Speckle multiplies the echo, so it adds to
the brightness.
"""

from __future__ import annotations

import numpy as np

from medfocus.phantoms.canvas import View, blur, bump, cloud, ellipse, lobes, ragged, rod, stamp, step
from medfocus.phantoms.phantom import Phantom

LABELS = ("benign", "malignant", "cyst")
TEXTS = (
    "RT BREAST",
    "LT BREAST",
    "LT 3:00",
    "RT 10:00",
    "RT AXILLA",
    "TRANS",
    "RAD",
    "L12-5",
    "MI 0.9",
    "LT3",
    "FR 24HZ",
)
POSTERIOR = {
    "benign": (0.40, 0.30),
    "malignant": (0.30, 0.45),
    "cyst": (0.50, 0.25),
}  # label -> shares of masses with a brighter and with a darker band behind them


def draw(label: str, rng: np.random.Generator, size: int) -> Phantom:
    """Draw a frame of a class of ``LABELS``; the skin is at the top."""
    view = View(size, turn=0.0, zoom=(1.0, 1.0), shift=(0.0, 0.0))
    x, y = view.grid()
    top, bottom = -1 + rng.uniform(0, 0.08), 1 - rng.choice((0.0, rng.uniform(0, 0.35)))
    depth = (y - top) / (bottom - top) * rng.uniform(0.85, 1.1)  # 0 at the skin, about 1 at the bottom
    mass = choose_mass(label, rng, top, bottom)
    echo = layers(rng, mass, x, y, depth)
    add_decoys(echo, rng, view, x, y, depth)
    outside = frame(rng, x, y, top, bottom)
    region = add_mass(echo, label, rng, view, mass, x, y) & ~outside
    shown = scan(rng, echo, x, depth)
    shown[outside] = 0.0
    annotate(rng, shown, view, mass)
    image = np.round(shown * 255).astype(np.uint8)
    findings = describe(label, region, mass, top, bottom)
    return Phantom(image, region, "breast_ultrasound", label, findings, {})


def choose_mass(
    label: str, rng: np.random.Generator, top: float, bottom: float
) -> tuple[float, float, float, float]:
    """Return centre and radii (x, y) of a mass; malignant masses grow across the layers and are less flat."""
    radius = float(np.sqrt(4 / np.pi * np.exp(rng.uniform(np.log(0.014), np.log(0.075)))))
    low, high = {"benign": (1.1, 1.6), "malignant": (0.8, 1.35), "cyst": (0.95, 1.55)}[label]
    flat = rng.uniform(low, high) ** 0.5
    rx, ry = radius * flat, radius / flat
    highest = top + 0.12 + ry
    lowest = max(top + 0.75 * (bottom - top) - ry, highest + 0.05)  # above the muscle, mostly
    return rng.uniform(rx - 0.8, 0.8 - rx), rng.uniform(highest, lowest), rx, ry


def describe(
    label: str, region: np.ndarray, mass: tuple[float, float, float, float], top: float, bottom: float
) -> dict[str, str]:
    """Describe the mass in words; sides are those of the image."""
    share = (mass[1] - top) / (bottom - top)
    return {
        "finding": label if label == "cyst" else f"{label} mass",
        "side": "left" if mass[0] < -0.27 else "right" if mass[0] > 0.27 else "middle",
        "region": "superficial breast"
        if share < 0.3
        else "deep breast"
        if share > 0.46
        else "mid-depth breast",
        "size": "small" if region.mean() < 0.025 else "medium" if region.mean() < 0.045 else "large",
    }


def layers(
    rng: np.random.Generator,
    mass: tuple[float, float, float, float],
    x: np.ndarray,
    y: np.ndarray,
    depth: np.ndarray,
) -> np.ndarray:
    """Draw the breast from skin to chest wall, (H, W), about 0 to 1; its layers bend around the mass."""
    size = len(x)
    cx, cy, rx, ry = mass
    near = bump(np.hypot((x - cx) / (1.9 * rx), (y - cy) / (2.2 * ry)), 1.0)
    bend = 0.05 * cloud(rng, size, 3) + rng.normal(0, 0.07) * x - rng.uniform(0, 0.7) * near * (y - cy) / 2
    rows = np.clip(np.arange(size)[:, None] + (bend * size).astype(np.intp), 0, size - 1)

    def bent(texture: np.ndarray) -> np.ndarray:
        return np.take_along_axis(texture, rows, 0)

    skin = rng.uniform(0.015, 0.045)
    deep = depth + bend * step(depth - skin - 0.1, 0.1)
    fat = deep - rng.uniform(0.10, 0.40) - 0.04 * cloud(rng, size, 2, 4)
    muscle = deep - rng.uniform(0.60, 0.92) - 0.02 * cloud(rng, size, 2, 3)
    # Thin bright walls around lobules of fat, streaks in the gland, fibres in the muscle.
    lobule = bent(cloud(rng, size, 8, 4))
    walls = bump(lobule, 0.2) * np.clip(0.16 + 0.12 * cloud(rng, size, 9), 0, 0.4)
    streaks = np.clip(bent(cloud(rng, size, 44, int(rng.integers(6, 14)))) - 0.3, 0, 2)
    streaks += 0.8 * np.clip(bent(cloud(rng, size, 24, int(rng.integers(4, 9)))) - 0.2, 0, 2)
    patches = bent(cloud(rng, size, 10, 6))
    turns = (depth + 0.4 * bend) * rng.uniform(20, 34) + 0.6 * cloud(rng, size, 5, 4)
    fibres = bump(turns - np.round(turns), 0.32) * np.clip(0.3 + 0.8 * cloud(rng, size, 12, 4), 0, 1.6)
    echo = rng.uniform(0.28, 0.42) + walls + 0.03 * lobule
    gland = rng.uniform(0.38, 0.52) + rng.uniform(0.08, 0.20) * streaks + rng.uniform(0.02, 0.08) * patches
    echo += (gland - echo) * step(fat, 0.04)
    echo += (rng.uniform(0.24, 0.36) + 0.17 * fibres - echo) * step(muscle, 0.012)
    echo += np.clip(0.18 + 0.12 * cloud(rng, size, 3, 9), 0, 0.4) * bump(muscle, 0.02)
    echo += (rng.uniform(0.55, 0.75) - echo) * step(skin - depth, 0.008) + 0.15 * bump(depth - skin, 0.012)
    if rng.random() < 0.4:  # the surface of the lung or a rib; nothing is visible behind it
        wall = muscle - rng.uniform(0.12, 0.25)
        echo += (0.08 - echo) * 0.8 * step(wall, 0.015)
        echo += 0.40 * bump(wall, 0.02) * step(cloud(rng, size, 2, 3) + 0.6, 0.3)
    return echo


def add_decoys(
    echo: np.ndarray, rng: np.random.Generator, view: View, x: np.ndarray, y: np.ndarray, depth: np.ndarray
) -> None:
    """Draw ducts, lobules of fat and shadows, independently of the class."""
    for _ in range(rng.integers(0, 3)):  # ducts or vessels
        at, reach = (rng.uniform(-0.9, 0.9), rng.uniform(-0.6, 0.5)), rng.uniform(0.04, 0.13)
        box = view.box(at, 1.2 * reach)
        tube = ellipse(x[box], y[box], at, (reach, rng.uniform(0.015, 0.045)), rng.normal(0, 0.4))
        echo[box] += (rng.uniform(0.0, 0.2) - echo[box]) * step(tube, 0.015) + 0.08 * bump(tube + 0.015, 0.02)
    for _ in range(rng.integers(0, 4)):  # lobules of fat with the grey of a mass and a bright wall
        at = (rng.uniform(-0.9, 0.9), rng.uniform(-0.8, 0.3))
        radius = rng.uniform(0.08, 0.2)
        box = view.box(at, 1.6 * radius)
        lump = (
            1 - ragged(x[box], y[box], at, (1.5 * radius, 0.7 * radius), lobes(rng, (0.1, 0.06)))
        ) * radius
        echo[box] += (rng.uniform(0.30, 0.42) - echo[box]) * 0.8 * step(lump, 0.02) + 0.10 * bump(lump, 0.02)
    for _ in range(rng.integers(0, 5)):  # shadows and bright bands that follow the beam
        start, width = rng.uniform(0, 0.6), rng.uniform(0.04, 0.25)
        band = bump(x - rng.uniform(-1, 1), width) * step(depth - start, 0.1)
        echo += rng.uniform(-0.24, 0.10) * band


def add_mass(
    echo: np.ndarray,
    label: str,
    rng: np.random.Generator,
    view: View,
    mass: tuple[float, float, float, float],
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Draw a mass, often with a brighter or darker band behind it; return its region (H, W) bool."""
    size = len(x)
    cx, cy, rx, ry = mass
    box = view.box((cx, cy), 1.8 * max(rx, ry))
    turn = rng.normal(0, 0.25)
    dx, dy = x[box] - cx, y[box] - cy
    px, py = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    if label == "malignant":
        outline = ragged(px, py, (0, 0), (rx, ry), lobes(rng, (0.13, 0.12, 0.10, 0.08, 0.06, 0.05)))
        outline = outline / spikes(rng, px, py) + 0.05 * cloud(rng, size, 20)[box]
        inside = rng.uniform(0.10, 0.26) + 0.06 * cloud(rng, size, 16)[box] + 0.05 * cloud(rng, size, 30)[box]
        specks = (rng.random(px.shape) < 0.004) & (outline < 0.8)  # calcifications
        inside += blur(specks.astype(float), 0.6 * size / 192) * rng.uniform(0, 1.5)
        soft, rim = 0.022, 0.10 * bump((1 - outline) * ry + 0.06, 0.08)  # invaded tissue around
    elif label == "benign":
        outline = ragged(px, py, (0, 0), (rx, ry), lobes(rng, (0.03, 0.05, 0.02)))
        inside = rng.uniform(0.14, 0.32) + 0.02 * cloud(rng, size, 14)[box]
        soft, rim = 0.014, 0.13 * bump((1 - outline) * ry + 0.014, 0.022)  # a thin capsule
    else:
        outline = ragged(px, py, (0, 0), (rx, ry), lobes(rng, (0.05, 0.03, 0.02)))
        near = (
            bump((1 - outline) * ry, 0.07) * step(-dy, 0.05) * rng.uniform(0, 0.3)
        )  # echoes of the near wall
        inside = rng.uniform(-0.25, 0.02) + near
        soft, rim = 0.010, 0.22 * bump((1 - outline) * ry + 0.012, 0.02) * step(np.abs(dy) - 0.5 * ry, 0.05)
    echo[box] += rim
    echo[box] += (inside - echo[box]) * step((1 - outline) * ry, soft)
    region = np.zeros((size, size), bool)
    region[box] = outline < 1
    brighter, darker = POSTERIOR[label]
    lot = rng.random()
    if lot < brighter + darker:
        column = step(0.85 * rx - np.abs(x - cx), 0.08) * step(y - cy - 0.8 * ry, 0.06) * ~region
        fade = np.clip(1 - (y - cy - ry) / rng.uniform(0.5, 1.2), 0, 1)
        echo += (rng.uniform(0.06, 0.18) if lot < brighter else -rng.uniform(0.08, 0.30)) * column * fade
    return region


def spikes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a factor of the radius, at least 1, for an outline with a few sharp spikes."""
    unit = (x + 1j * y) / (np.hypot(x, y) + 1e-9)
    factor = np.ones_like(x)
    for at in rng.uniform(0, 2 * np.pi, rng.integers(5, 10)):
        along = np.maximum((unit * np.exp(-1j * at)).real, 0)
        factor += rng.uniform(0.12, 0.40) * along ** int(rng.integers(40, 90))
    return factor


def scan(rng: np.random.Generator, echo: np.ndarray, x: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Apply attenuation, gain, speckle and the display curve: echoes -> brightness 0 to 1, (H, W)."""
    size = len(echo)
    unit = size / 192
    along, across = rng.uniform(0.5, 0.8) * unit, rng.uniform(0.8, 1.7) * unit
    real, imaginary = (blur(rng.standard_normal(echo.shape), along, across) for _ in range(2))
    power = real * real + imaginary * imaginary
    speckle = np.maximum(np.log(power * (1 / power.mean()) + 1e-6), -2.6)  # log power; its mean is -0.58
    loss = rng.uniform(0.0, 0.40) * depth * depth + rng.uniform(-0.1, 0.1) * depth
    gain = rng.normal(0, 0.05) + rng.uniform(0.02, 0.06) * cloud(rng, size, 3, 2)
    shown = echo - loss + gain + rng.uniform(0.035, 0.085) * (speckle + 0.58)
    if rng.random() < 0.5:  # average of frames
        shown = blur(shown, rng.uniform(0.3, 0.6) * unit)
    return np.clip(shown, 0, 1) ** rng.uniform(0.85, 1.4)


def frame(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, top: float, bottom: float) -> np.ndarray:
    """Return the pixels outside of the beam, (H, W) bool. Most beams are straight, and some are fans."""
    outside = (y < top) | (y > bottom)
    if rng.random() < 0.25:
        spread = rng.uniform(0.05, 0.2)
        outside |= np.abs(x) > 0.78 + spread * (y + 0.2)
        outside |= y < top + rng.uniform(0.03, 0.10) * (1 - x * x)
    elif rng.random() < 0.4:
        outside |= np.abs(x - rng.uniform(-0.06, 0.06)) > rng.uniform(0.82, 0.97)
    return outside


def annotate(
    rng: np.random.Generator, image: np.ndarray, view: View, mass: tuple[float, float, float, float]
) -> None:
    """Draw text, a depth scale, a grey bar, a body mark, and callipers at the mass or elsewhere, in place."""
    size = view.size
    unit = max(size // 192, 1)
    shine = rng.uniform(0.75, 1.0)
    for _ in range(rng.choice((0, 1, 2), p=(0.6, 0.25, 0.15))):
        cx, cy, rx, ry = mass
        if rng.random() < 0.5:  # a measurement elsewhere
            cx, cy, rx, ry = (
                rng.uniform(-0.6, 0.6),
                rng.uniform(-0.6, 0.5),
                rng.uniform(0.1, 0.3),
                rng.uniform(0.1, 0.3),
            )
        turn = rng.choice((0, np.pi / 2)) + rng.normal(0, 0.2)
        reach = np.array((rx * np.cos(turn), ry * np.sin(turn)))
        for share in np.linspace(-1, 1, int(rng.choice((2, 15)))):
            column, row = view.place(np.array(cx + share * reach[0]), np.array(cy + share * reach[1]))
            row, column = int(np.clip(row, 0, size - 1)), int(np.clip(column, 0, size - 1))
            arm = 3 * unit if abs(share) == 1 else 0
            image[max(row - arm, 0) : row + arm + 1, column : column + unit] = shine
            image[row : row + unit, max(column - arm, 0) : column + arm + 1] = shine
    for _ in range(rng.choice((0, 1, 2), p=(0.45, 0.4, 0.15))):
        place = (rng.uniform(0.02, 0.9), rng.choice((0.01, 0.86, 0.94)))
        stamp(image, str(rng.choice(TEXTS)), place, unit * int(rng.choice((1, 1, 2))), shine)
    if rng.random() < 0.25:  # depth scale
        gap = int(size * rng.uniform(0.06, 0.12))
        image[gap::gap, -4 * unit : -unit] = shine
    if rng.random() < 0.2:  # grey bar
        image[size // 5 : size // 2, 2 * unit : 6 * unit] = np.linspace(1, 0, size // 2 - size // 5)[:, None]
    if rng.random() < 0.15:  # body mark
        x, y = view.grid()
        at = (rng.choice((-0.85, 0.85)), 0.85)
        ring = np.abs(ellipse(x, y, at, (0.1, 0.1))) < 1.2 / size
        hand = rod(x, y, at, (at[0] + rng.uniform(-0.08, 0.08), at[1] - 0.06), 0.02) > 0
        image[ring | hand] = shine
