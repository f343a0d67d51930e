"""Judge a picture of the embedded model by its pixels alone: what is seen is found without the prompt, then compared.

Independent of the training code's drawing: shapes are told apart by geometry (how full the bounding box is, where the
mass lies, whether there is a hole), not by comparing with a rendered template.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

PALETTE = {
    "red": (220, 30, 35), "orange": (255, 140, 0), "yellow": (250, 220, 20), "green": (25, 150, 60),
    "cyan": (0, 205, 220), "blue": (35, 60, 225), "purple": (130, 40, 180), "pink": (255, 125, 195),
}  # fmt: skip
GROUNDS = {
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
    "black": (10, 10, 10),
    "brown": (105, 65, 35),
}

CATEGORIES = ("background", "count", "position", "color", "shape", "size", "relation")
NEAR = 0.12  # how far, as a share of the side, an object may stand from where the caption puts it
KEPT = 0.05  # and from where it stood, if it was to stay there; the seed moves one by 0.012


@dataclass(frozen=True)
class Seen:
    """One object found in a picture: names, and its centre and extent as shares of the side."""

    color: str
    shape: str
    size: str
    x: float
    y: float


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.abs(color - np.array(names[name])).sum()))


def find_background(picture: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and value of the background, from the picture's rim. picture: [H, W, 3] uint8."""
    rim = np.concatenate(
        [picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, :4].reshape(-1, 3)]
    )
    color = np.median(rim, axis=0)
    return _nearest(color, GROUNDS), color


def find_objects(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """Background and objects, largest first. picture: [H, W, 3] uint8."""
    background, ground = find_background(picture)
    distance = np.abs(picture.astype(float) - ground).sum(-1)
    labels, count = ndimage.label(ndimage.binary_opening(distance > 90, iterations=1))
    height, width = distance.shape
    seen = []
    for label in range(1, count + 1):
        mask = labels == label
        if mask.sum() < 0.002 * height * width:
            continue
        inner = ndimage.binary_erosion(mask, iterations=3)
        color = np.median(picture[inner if inner.any() else mask].reshape(-1, 3), axis=0)
        ys, xs = np.nonzero(mask)
        top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
        extent = max(bottom - top, right - left) / min(height, width)
        size = "large" if extent > 0.30 else "small"
        center = ((left + right) / 2 / width, (top + bottom) / 2 / height)
        seen.append((mask.sum(), Seen(_nearest(color, PALETTE), name_shape(mask), size, *center)))
    return background, [item for _, item in sorted(seen, key=lambda pair: -pair[0])]


def name_shape(mask: np.ndarray) -> str:
    """Name the shape of one connected mask [H, W] of bool."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    filled = ndimage.binary_fill_holes(box)
    if filled.sum() > 1.08 * box.sum():
        return "ring"
    height, width = box.shape
    full = box.mean()
    if full > 0.90:
        return "square"
    corner = max(1, round(0.22 * height)), max(1, round(0.22 * width))
    corners = [box[: corner[0], : corner[1]], box[: corner[0], -corner[1] :], box[-corner[0] :, : corner[1]], box[-corner[0] :, -corner[1] :]]  # fmt: skip
    bottom_corners = np.mean([c.mean() for c in corners[2:]])
    if full > 0.70:
        return "circle"
    top, bottom = box[: height // 3].mean(), box[-(height // 3) :].mean()
    waist = box[round(0.45 * height) : round(0.55 * height)].mean()
    if bottom > 2.5 * top and bottom_corners > 0.35 and waist < 0.75:
        return "triangle"
    ends = (
        box[: max(1, round(0.12 * height))].any(0).mean(),
        box[-max(1, round(0.12 * height)) :].any(0).mean(),
    )
    if waist > 0.9 and abs(ends[0] - ends[1]) < 0.25 and max(ends) < 0.5:
        return "cross"
    return "star"


def nearest(things: tuple, seen: list[Seen]) -> list[tuple]:
    """For each thing asked for: it, the object that stands nearest to its place (or None), and how far that is."""
    pairs = []
    for thing in things:
        gaps = [float(np.hypot(o.x - thing.center[0], o.y - thing.center[1])) for o in seen]
        best = int(np.argmin(gaps)) if gaps else None
        pairs.append((thing, None if best is None else seen[best], gaps[best] if gaps else 1.0))
    return pairs


def judge(picture: np.ndarray, scene) -> dict[str, bool]:
    """Compare what is seen with what was asked: one verdict a category (relation: two objects only)."""
    background, seen = find_objects(picture)
    verdict = {
        "background": background == scene.background,
        "count": len(seen) == len(scene.things),
    }
    pairs = nearest(scene.things, seen)
    verdict["position"] = all(gap < NEAR for *_, gap in pairs)
    for category in ("color", "shape", "size"):
        verdict[category] = all(
            o is not None and getattr(o, category) == getattr(t, category) for t, o, _ in pairs
        )
    if len(pairs) == 2:
        first, second = (
            next(
                (o for o in seen if (o.color, o.shape, o.size) == (t.color, t.shape, t.size)), None
            )
            for t in scene.things
        )
        holds = {
            "to the left of": lambda a, b: a.x < b.x - 0.1,
            "to the right of": lambda a, b: a.x > b.x + 0.1,
            "above": lambda a, b: a.y < b.y - 0.1,
            "below": lambda a, b: a.y > b.y + 0.1,
        }[scene.where]
        same = (scene.things[0].color, scene.things[0].shape, scene.things[0].size) == (
            scene.things[1].color, scene.things[1].shape, scene.things[1].size)  # fmt: skip
        verdict["relation"] = (
            verdict["position"] if same else bool(first and second and holds(first, second))
        )
    return verdict


def judge_edit(picture: np.ndarray, reference: np.ndarray, edit) -> dict[str, bool]:
    """Compare what is seen with what an edit asked and with the reference.

    Returns:
        "asked": whether what was asked is there; and one verdict a category of what was to stay.
    """
    background, seen = find_objects(picture)
    before = nearest(edit.source.things, find_objects(reference)[1])
    pairs = nearest(edit.result.things, seen)
    verdict = {"count": len(seen) == len(pairs), "background": background == edit.result.background}
    right = {
        category: [o is not None and getattr(o, category) == getattr(t, category) for t, o, _ in pairs]
        for category in ("color", "shape", "size")
    }  # fmt: skip
    right["position"] = [
        new is not None and old is not None and np.hypot(new.x - old.x, new.y - old.y) < KEPT
        for (_, old, _), (_, new, _) in zip(before, pairs, strict=True)
    ]
    place = pairs[edit.which][2] < NEAR
    if edit.kind == "background":
        asked = verdict.pop("background")
    elif edit.kind == "recolour":
        asked = right["color"].pop(edit.which) and place
    else:
        del right["position"][edit.which]
        asked = place
    return {"asked": asked, **verdict, **{name: all(each) for name, each in right.items()}}
