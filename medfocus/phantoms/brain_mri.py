"""Draw axial brain slices with no tumor, a glioma, a meningioma or a pituitary tumor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medfocus.phantoms.canvas import View, blur, bump, cloud, ellipse, lobes, ragged, rod, stamp, step
from medfocus.phantoms.phantom import Phantom

LABELS = ("no tumor", "glioma", "meningioma", "pituitary tumor")
LEVELS = ("sella", "thalami", "ventricles", "vertex")  # from inferior to superior
TEXTS = ("A", "R", "L", "AX", "SE 4 IM 12", "HEAD", "5MM", "FOV 240", "256X256")


@dataclass(frozen=True)
class Sequence:
    """The brightness of each tissue in an MRI sequence, 0 to 1."""

    name: str
    scalp: float
    marrow: float
    fluid: float
    grey: float
    white: float
    dura: float
    swelling: float


SEQUENCES = (
    Sequence("T1 with contrast", 0.82, 0.40, 0.10, 0.35, 0.47, 0.62, 0.36),
    Sequence("FLAIR", 0.62, 0.30, 0.07, 0.56, 0.44, 0.30, 0.72),
    Sequence("T2", 0.50, 0.26, 0.80, 0.51, 0.36, 0.20, 0.55),
)


@dataclass(frozen=True)
class Site:
    """The site of a tumor, where the anatomy is displaced. A slice without a tumor has a site too."""

    centre: tuple[float, float]  # scene units
    radius: float
    place: str  # "brain", "skull", "falx", "sella"


def draw(label: str, rng: np.random.Generator, size: int) -> Phantom:
    """Draw a slice of a class of ``LABELS``; the nose is at the top, the patient's left at the right."""
    zoom = rng.uniform(0.90, 1.07)
    view = View(
        size,
        turn=rng.normal(0, 0.12),
        zoom=(zoom * rng.uniform(0.95, 1.06), zoom * rng.uniform(0.97, 1.03)),
        shift=(rng.normal(0, 0.04), rng.normal(0, 0.04)),
    )
    x, y = view.grid()
    x += 0.012 * cloud(rng, size, 3)
    y += 0.012 * cloud(rng, size, 3)
    sequence = SEQUENCES[int(rng.choice(3, p=(0.55, 0.25, 0.2)))]
    outside = (
        1 - np.hypot(x / (rng.uniform(0.66, 0.76) * (1 + 0.09 * y)), y / rng.uniform(0.86, 0.92))
    ) * 0.74
    scalp, skull = rng.uniform(0.018, 0.05), rng.uniform(0.04, 0.065)
    inside = outside - scalp - skull  # distance into the cranial cavity
    site = choose_site(label, rng, view, inside, x, y)
    level = choose_level(rng, site)
    push = 0.0 if label == "no tumor" and rng.random() < 0.5 else rng.uniform(0.15, 0.45)
    dx, dy = x - site.centre[0], y - site.centre[1]
    give = push * bump(np.hypot(dx, dy), 2.2 * site.radius) * step(inside - 0.02, 0.05)
    slice_, brain, fluid = tissue(rng, sequence, level, inside, x - dx * give, y - dy * give)
    add_spots(slice_, rng, view, sequence, inside, x, y)
    region, findings = np.zeros((size, size), bool), {"finding": "no tumor"}
    if label != "no tumor":
        region, findings = add_tumor(slice_, label, rng, sequence, site, level, inside, x, y)
    head = wrap(rng, sequence, slice_, inside, outside, skull, x, y)
    if level == "sella" and site.centre[1] - 1.3 * site.radius > -0.42 and rng.random() < 0.7:
        brain = brain & ~add_orbits(head, rng, sequence, outside, x, y)
    image = acquire(rng, head)
    findings["sequence"] = sequence.name
    parts = {"brain": brain, "cisterns" if level == "sella" else "ventricles": fluid & ~region}
    return Phantom(image, region, "brain_mri", label, findings, {k: v for k, v in parts.items() if v.any()})


def choose_site(
    label: str, rng: np.random.Generator, view: View, inside: np.ndarray, x: np.ndarray, y: np.ndarray
) -> Site:
    """Choose a site. Other classes may have it at the sella too, so that it does not reveal the class."""
    area = np.exp(rng.uniform(np.log(0.013), np.log(0.045)))
    radius = float(np.sqrt(4 * area / np.pi / (view.zoom[0] * view.zoom[1])))
    middle = (rng.normal(0, 0.03), rng.uniform(-0.28, -0.02))
    if label == "pituitary tumor" or rng.random() < 0.35:
        return Site(middle, radius, "sella")
    if label == "meningioma" and rng.random() < 0.25:
        far = float(rng.choice((-0.55, 0.45))) + rng.normal(0, 0.08)
        return Site((rng.choice((-1, 1)) * 0.6 * radius, far), radius, "falx")
    if label == "meningioma":
        band = (inside > 0.45 * radius) & (inside < 0.65 * radius)
    else:
        band = (inside > min(rng.uniform(0.75, 1.6) * radius, 0.9 * inside.max())) & (
            np.abs(x) > 0.3 * radius
        )
    place = int(rng.choice(np.flatnonzero(band)))
    return Site(
        (float(x.flat[place]), float(y.flat[place])), radius, "skull" if label == "meningioma" else "brain"
    )


def choose_level(rng: np.random.Generator, site: Site) -> str:
    """Choose a level of LEVELS: one of the two lowest for the sella, any level for other sites."""
    return str(rng.choice(LEVELS, p=(0.6, 0.4, 0, 0) if site.place == "sella" else (0.25, 0.25, 0.25, 0.25)))


def tissue(
    rng: np.random.Generator, sequence: Sequence, level: str, inside: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the tissue of a level; return brightness, brain and ventricles, each (H, W)."""
    size = len(x)
    x, y = x + 0.014 * cloud(rng, size, 6), y + 0.014 * cloud(rng, size, 6)
    u = np.abs(x)
    age = rng.uniform(0, 1)  # sulci and ventricles widen with age
    gap, wide = 0.010 + 0.03 * age * age, 0.6 + 0.9 * age
    depth = inside - gap
    surface = sulci(rng, depth, x, y, 0.10 if level == "vertex" else 0.0)  # distance to the nearest surface
    front, back = {"vertex": (9.0, 9.0), "sella": (-0.30, 9.0)}.get(level, (-0.30, 0.34))
    halves = u if level == "vertex" else np.hypot(x, np.maximum(np.minimum(y - front, back - y), 0))
    surface = np.minimum(surface, halves)
    if level == "vertex":
        fluid = 0.035 * wide * (1 - (y / 0.27) ** 2) - np.abs(u - 0.08 - 0.6 * y * y)
        fluid = np.minimum(fluid, 0.35 - np.abs(y)) if rng.random() < 0.6 else np.full_like(x, -1.0)
        nuclei = np.full_like(x, -1.0)
    elif level == "sella":
        fissure = rod(u, y, (0.12, -0.10), (0.45, -0.20), 0.0), rod(u, y, (0.45, -0.20), (0.75, -0.16), 0.0)
        surface = np.minimum(surface, -np.maximum(*fissure))
        star = np.minimum(ellipse(x, y, (0, -0.08), (0.15, 0.10)), 0.11 - 0.6 * u - 0.5 * np.abs(y + 0.08))
        stem = np.maximum(ellipse(x, y, (0, 0.18), (0.16, 0.12)), rod(u, y, (0.05, 0.14), (0.12, 0.05), 0.06))
        fluid = np.maximum(star, np.minimum(stem + 0.022, 0.012 - stem))
        fluid = np.maximum(fluid, rod(x, y, (0, 0.22), (0, 0.25), 0.012))
        tent = y - 0.40 + 0.75 * u - 0.55 * u * u  # the cerebellum lies behind
        leaf = np.hypot(0.7 * x, y - 0.16) * 15 + 0.12 * cloud(rng, size, 12)
        folds = np.minimum(np.abs(leaf - np.round(leaf)) * (1 / 15) + 0.016, np.minimum(depth, tent + 0.004))
        surface = np.where(tent > 0, np.minimum(folds, u + 0.012), surface)
        surface = np.minimum(surface, np.abs(tent) + np.clip(0.18 - u, 0, 1))
        nuclei = stem - 0.06
    else:
        insula = 0.40 - 0.9 * (y + 0.02) * (y + 0.02)
        fissure = np.hypot(u - insula, np.maximum(np.abs(y + 0.02) - 0.15, 0))
        surface = np.minimum(surface, np.minimum(fissure, -rod(u, y, (0.39, -0.04), (0.75, -0.16), 0.0)))
        along = -0.06 - y  # forwards into the frontal horns
        fluid = np.minimum(0.05 * wide * (1 - (along - 0.12) ** 2 / 0.021), 0.2 - np.abs(along - 0.12))
        fluid -= np.abs(u - 0.045 - 0.5 * np.clip(along, 0, 1) ** 1.3)
        fluid = np.maximum(fluid, rod(x, y, (0, -0.02), (0, 0.12), 0.013 * wide))
        if level == "ventricles":
            along = y - 0.14  # backwards into the occipital horns
            horn = 0.05 * wide * (1 - (along - 0.09) ** 2 / 0.018) - np.abs(
                u - 0.12 - 0.75 * along + 1.4 * along * along
            )
            fluid = np.maximum(fluid, np.minimum(horn, 0.16 - np.abs(along - 0.09)))
        else:
            fluid = np.maximum(
                fluid, np.minimum(ellipse(x, y, (0, 0.31), (0.09, 0.05)), y - 0.27 - 0.4 * u + 0.03)
            )
        nuclei = ellipse(u, y, (0.17, -0.18), (0.05, 0.10), -0.25)
        nuclei = np.maximum(nuclei, ellipse(u, y, (0.115, 0.09), (0.085, 0.13), -0.35))
        nuclei = np.maximum(nuclei, ellipse(u, y, (0.275, -0.05), (0.05, 0.15), -0.2))
    surface = np.minimum(surface, 0.05 - fluid)
    white = step(surface - 0.046 - 0.007 * cloud(rng, size, 12), 0.016) * (1 - 0.85 * step(nuclei, 0.015))
    brightness = sequence.grey + (sequence.white - sequence.grey) * white + 0.014 * cloud(rng, size, 18)
    wet = 1 - step(surface - 0.003 - 0.012 * age, 0.010) * step(depth, 0.010) * (1 - step(fluid, 0.012))
    brightness += (sequence.fluid - brightness) * wet
    falx = bump(x, 0.012) * step(np.maximum(front - y, y - back), 0.05)
    brightness += (sequence.dura - brightness) * 0.7 * falx
    return brightness, depth > 0, (fluid > 0) & (depth > 0)


def sulci(
    rng: np.random.Generator, depth: np.ndarray, x: np.ndarray, y: np.ndarray, deeper: float
) -> np.ndarray:
    """Return the distance to the surface of the brain, (H, W), with two sets of irregular folds."""
    size = len(x)
    angle = np.arctan2(y, x) * (0.5 / np.pi) + 0.018 * cloud(rng, size, 7) + 0.008 * cloud(rng, size, 15)
    radius = np.hypot(x, y)
    nearest = depth
    for count, low, high in (
        (int(rng.integers(20, 28)), 0.07, 0.22),
        (int(rng.integers(34, 46)), 0.02, 0.10),
    ):
        turn = angle * count + rng.uniform(0, 1)
        fold = np.round(turn)
        reach = rng.uniform(low, high + deeper, count)[fold.astype(np.intp) % count]
        across = np.abs(turn - fold) * radius * (2 * np.pi / count)
        nearest = np.minimum(nearest, np.hypot(across, np.maximum(depth - reach, 0)))
    return nearest


def add_spots(
    slice_: np.ndarray,
    rng: np.random.Generator,
    view: View,
    sequence: Sequence,
    inside: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Draw spots in the white matter, a cyst and enhancing vessels, independently of the class."""
    deep = np.flatnonzero(inside > 0.12)
    spots = []  # (brightness, radius)
    if rng.random() < 0.5:
        spots += [(sequence.swelling, rng.uniform(0.012, 0.035)) for _ in range(rng.integers(1, 9))]
    if sequence.name == "T1 with contrast":
        spots += [(rng.uniform(0.6, 0.95), rng.uniform(0.008, 0.018)) for _ in range(rng.integers(2, 9))]
    if rng.random() < 0.3:  # a cyst or an old infarct
        spots += [(sequence.fluid, rng.uniform(0.05, 0.14))]
    for brightness, radius in spots:
        pick = int(rng.choice(deep))
        at = (float(x.flat[pick]), float(y.flat[pick]))
        box = view.box(at, 1.4 * radius)
        spot = ragged(x[box], y[box], at, (radius, radius * rng.uniform(0.7, 1.4)), lobes(rng, (0.15, 0.1)))
        slice_[box] += (brightness - slice_[box]) * rng.uniform(0.5, 1) * step((1 - spot) * radius, 0.01)


def add_tumor(
    slice_: np.ndarray,
    label: str,
    rng: np.random.Generator,
    sequence: Sequence,
    site: Site,
    level: str,
    inside: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> tuple[np.ndarray, dict[str, str]]:
    """Draw a tumor at its site, with or without edema; return its region (H, W) and its findings."""
    size = len(x)
    (cx, cy), radius = site.centre, site.radius
    stretch = rng.uniform(0.85, 1.18)
    radii = (radius * stretch, radius / stretch)
    bright = sequence.white + rng.uniform(0.2, 0.42)
    room = inside - 0.005
    if label == "glioma":
        outline = ragged(x, y, site.centre, radii, lobes(rng, (0.12, 0.10, 0.08, 0.06, 0.05))) + 0.05 * cloud(
            rng, size, 16
        )
        hole = ragged(
            x,
            y,
            (cx + rng.normal(0, 0.1) * radius, cy + rng.normal(0, 0.1) * radius),
            radii,
            lobes(rng, (0.2, 0.15, 0.12, 0.1)),
        )
        hole = step((rng.uniform(0.55, 0.72) - hole + 0.08 * cloud(rng, size, 14)) * radius, 0.02)
        core = min(sequence.fluid, 0.2) + 0.10 + 0.07 * cloud(rng, size, 16)
        rim = bright * (1 + 0.10 * cloud(rng, size, 14))
        body = rim + (core - rim) * hole
    elif label == "meningioma":
        outline = ragged(x, y, site.centre, radii, lobes(rng, (0.03, 0.03, 0.02)))
        if site.place == "falx":
            room = np.minimum(room, np.sign(cx) * x - 0.008)
        body = bright * (1 + 0.02 * cloud(rng, size, 10))
    else:
        # Two balls with a waist between them, often with a cyst that holds settled blood.
        upper = ragged(
            x, y, (cx, cy - 0.55 * radius), (0.74 * radii[0], 0.60 * radii[1]), lobes(rng, (0.05, 0.04, 0.03))
        )
        lower = ragged(
            x, y, (cx, cy + 0.40 * radius), (0.98 * radii[0], 0.72 * radii[1]), lobes(rng, (0.06, 0.04, 0.03))
        )
        outline = np.minimum(upper, lower)
        body = sequence.white + 0.75 * (bright - sequence.white) + 0.05 * cloud(rng, size, 24)
        if rng.random() < 0.6:
            level_y = cy + rng.uniform(0.3, 0.6) * radius
            lake = ragged(
                x,
                y,
                (cx + rng.normal(0, 0.15) * radius, cy + 0.4 * radius),
                (0.5 * radii[0], 0.36 * radii[1]),
                lobes(rng, (0.12, 0.08)),
            )
            lake = step((1 - lake) * 0.4 * radius, 0.02) * rng.uniform(0.5, 1)
            settled = step(y - level_y, 0.012)
            body += lake * (settled * 0.15 + (1 - settled) * (sequence.grey - 0.15 - body))
    if rng.random() < 0.6:
        halo = step((rng.uniform(1.4, 1.9) - outline + 0.25 * cloud(rng, size, 8)) * radius, 0.04) * step(
            inside - 0.08, 0.03
        )
        slice_ += (sequence.swelling - slice_) * rng.uniform(0.4, 0.9) * halo
    edge = np.minimum((1 - outline) * radius, room)
    cleft = bump(edge + 0.012, 0.02) * step(inside - 0.03, 0.02)
    slice_ += (min(sequence.fluid, 0.2) - slice_) * (0.25 if label == "glioma" else 0.6) * cleft
    slice_ += (body - slice_) * step(edge, 0.010)
    region = (edge > 0) & (outline < 1)
    side = "middle" if abs(cx) < 0.08 else "left" if cx > 0 else "right"
    lobe = (
        "frontal"
        if cy < -0.22
        else "occipital"
        if cy > 0.38
        else "temporal"
        if level == "sella"
        else "parietal"
    )
    if site.place in ("sella", "falx"):
        name = site.place
    elif side == "middle":
        name = f"{lobe} lobe"
    else:
        name = f"{side} {lobe} lobe"
    extent = "small" if region.mean() < 0.02 else "medium" if region.mean() < 0.034 else "large"
    return region, {"finding": label, "side": side, "region": name, "size": extent}


def wrap(
    rng: np.random.Generator,
    sequence: Sequence,
    slice_: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    skull: float,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Add skull and scalp to the slice, (H, W); air is 0."""
    size = len(x)
    bone = np.clip(-inside / skull, 0, 1)
    marrow = sequence.marrow * bump(bone - 0.5, 0.38) * (0.8 + 0.3 * cloud(rng, size, 8))
    fat = sequence.scalp * (0.85 + 0.12 * cloud(rng, size, 10))
    lump = rng.uniform(0, 0.02) * np.clip(cloud(rng, size, 5), 0, 2)
    head = marrow + (fat - marrow) * step(-inside - skull, 0.008)
    head += (sequence.dura - head) * bump(inside, 0.014)
    head += (slice_ - head) * step(inside - 0.008, 0.008)
    head *= step(outside + lump, 0.010)
    if sequence.name == "T1 with contrast":  # the superior sagittal sinus
        head += (
            (0.85 - head) * step(ellipse(x, y, (0, 0.76), (0.035, 0.03)), 0.01) * step(inside + 0.02, 0.01)
        )
    return head


def add_orbits(
    head: np.ndarray,
    rng: np.random.Generator,
    sequence: Sequence,
    outside: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Draw the face in a low slice: eyes in fat, optic nerves, muscles and the ethmoid cells.

    Returns the region of the face, (H, W) bool.
    """
    size, u = len(x), np.abs(x)
    line = -0.40 - 0.30 * u + rng.uniform(-0.04, 0.04)  # of the skull base
    face = np.minimum(line - y, outside - 0.02)
    fat = sequence.scalp * (0.85 + 0.08 * cloud(rng, size, 14))
    cells = np.where(np.abs(cloud(rng, size, 12)) < 0.35, 0.6 * sequence.scalp, 0.03)  # thin walls around air
    fat += (cells - fat) * step(0.125 - u, 0.015)
    fat += (0.03 - fat) * bump(u - 0.13, 0.02)
    muscles = np.maximum(
        rod(u, y, (0.17, -0.62), (0.11, -0.42), 0.022), rod(u, y, (0.45, -0.62), (0.20, -0.42), 0.025)
    )
    nerve = rod(u, y, (0.30, -0.60), (0.12, -0.36), 0.018)
    fat += (sequence.grey - fat) * step(np.maximum(muscles, nerve), 0.01)
    eye = ellipse(u, y, (0.305, -0.68), (0.125, 0.125))
    fat += (0.6 * sequence.grey - fat) * step(eye, 0.008)
    fat += (sequence.fluid * 0.8 + 0.06 - fat) * step(eye - 0.018, 0.008)
    fat += (0.25 - fat) * step(ellipse(u, y, (0.305, -0.775), (0.05, 0.02)), 0.008)  # the lens
    head += (fat - head) * step(face, 0.012)
    head += (0.06 - head) * bump(face, 0.022)
    return face > 0


def acquire(rng: np.random.Generator, head: np.ndarray) -> np.ndarray:
    """Apply coil shading, blur, ghosts, Rician noise, window and text: brightness -> (H, W) uint8."""
    size = len(head)
    head = head * np.exp(rng.uniform(0.03, 0.16) * cloud(rng, size, 2))
    head = blur(head, rng.uniform(0.45, 0.85) * size / 192)
    if rng.random() < 0.2:
        head += rng.uniform(0.02, 0.07) * np.roll(
            head, int(size * rng.uniform(0.3, 0.7)), int(rng.integers(0, 2))
        )
    noise = rng.uniform(0.006, 0.035)
    head = np.hypot(head + noise * rng.standard_normal(head.shape), noise * rng.standard_normal(head.shape))
    tone = np.clip(head / rng.uniform(0.72, 1.1), 0, 1) ** rng.uniform(0.75, 1.3)
    image = np.round(tone * rng.uniform(200, 255)).clip(0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 3)):
        place = (rng.choice((0.02, 0.7, 0.95)), rng.choice((0.01, 0.06, 0.94)))
        stamp(image, str(rng.choice(TEXTS)), place, max(size // 192, 1), rng.uniform(140, 255))
    return image
