"""The little world of the embedded model: scenes, their captions, their pictures, and edits of them.

A scene is one or two flat shapes on a plain background; an edit is one thing changed in it. Everything is sampled from a
seed and drawn with signed distance functions, so captions and pictures can be made anywhere, without a data set.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, replace

import torch

COLORS = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 20),
    "green": (25, 150, 60),
    "cyan": (0, 205, 220),
    "blue": (35, 60, 225),
    "purple": (130, 40, 180),
    "pink": (255, 125, 195),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
    "black": (10, 10, 10),
    "brown": (105, 65, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.11, "large": 0.20}  # radius as a share of the shorter side
PLACES = {
    "in the center": (0.50, 0.50),
    "at the top": (0.50, 0.27),
    "at the bottom": (0.50, 0.73),
    "on the left": (0.27, 0.50),
    "on the right": (0.73, 0.50),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}
RELATIONS = {  # where the first object stands, where the second one does
    "to the left of": ((0.27, 0.50), (0.73, 0.50)),
    "to the right of": ((0.73, 0.50), (0.27, 0.50)),
    "above": ((0.50, 0.27), (0.50, 0.73)),
    "below": ((0.50, 0.73), (0.50, 0.27)),
}
PHRASINGS = (
    "{objects} on a {background} background",
    "a {background} background with {objects}",
    "on a {background} background, {objects}",
    "a picture of {objects}, {background} background",
)
INSTRUCTIONS = {
    "recolour": ("make {thing} {value}", "turn {thing} {value}", "change {thing} to {value}"),
    "move": ("move {thing} {to}", "put {thing} {value}"),
    "background": ("change the background to {value}", "make the background {value}"),
}
APART = 1.25  # things stand at least so many times their radii from each other: a square's corner is at 1.2
JITTER = (
    0.012  # standard deviation of an object's centre, as a share of the side: what the seed changes
)


@dataclass(frozen=True)
class Thing:
    size: str
    color: str
    shape: str
    center: tuple[float, float]  # (x, y) as shares of width and height

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # one or two
    where: str  # a key of PLACES (one thing) or RELATIONS (two); "" where an edit left two things in no such relation

    @property
    def held_out(self) -> bool:
        """Whether this scene belongs to the 5 % that no training run ever sees, in any phrasing."""
        return _one_in_twenty(self)

    def names(self, which: int) -> list[str]:
        """What a thing may be called so that no other thing of the scene is meant; none if there are twins."""
        found = []
        for parts in (
            ("shape",),
            ("color", "shape"),
            ("size", "shape"),
            ("size", "color", "shape"),
        ):
            called = [tuple(getattr(thing, part) for part in parts) for thing in self.things]
            if called.count(called[which]) == 1:
                found.append(" ".join(("the", *called[which])))
        return found

    def caption(self, rng: random.Random) -> str:
        first = str(self.things[0])
        objects = f"{first} {self.where}" + (f" {self.things[1]}" if len(self.things) == 2 else "")
        return rng.choice(PHRASINGS).format(objects=objects, background=self.background)


def sample_scene(rng: random.Random) -> Scene:
    """Draw one scene; four in ten have a single thing."""
    if rng.random() < 0.4:
        where, center = rng.choice(list(PLACES.items()))
        centers = (center,)
    else:
        where, centers = rng.choice(list(RELATIONS.items()))
    things = tuple(
        Thing(rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(SHAPES), center)
        for center in centers
    )
    return Scene(rng.choice(list(BACKGROUNDS)), things, where)


def sample_scenes(count: int, seed: int, held_out: bool) -> list[tuple[Scene, str]]:
    """Draw scenes of one side of the split, each with a caption."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng)
        if scene.held_out == held_out:
            found.append((scene, scene.caption(rng)))
    return found


@dataclass(frozen=True)
class Edit:
    """A scene, what is asked, and the scene that it should become."""

    kind: str  # a key of INSTRUCTIONS
    value: str  # of COLORS, PLACES or BACKGROUNDS
    which: int  # the thing that it is about; 0 for the background
    source: Scene
    result: Scene

    @property
    def unseen(self) -> bool:
        """Whether to ask this of such things belongs to the 5 % that no training run ever does, in any scene."""
        things = self.source.things if self.kind == "background" else self.source.things[self.which :][:1]  # fmt: skip
        return _one_in_twenty((self.kind, self.value, *map(str, things)))

    @property
    def held_out(self) -> bool:
        """Whether both the scene and what is asked of it are new to any training run."""
        return self.source.held_out and self.unseen

    @property
    def trained(self) -> bool:
        """Whether a training run may see it: nothing of it is held out."""
        return not (self.source.held_out or self.result.held_out or self.unseen)

    def instruction(self, rng: random.Random) -> str:
        """The edit in words, which say nothing of what is to stay."""
        to = f"to {self.value.partition(' ')[2]}"  # "at the top": "to the top"
        thing = rng.choice(self.source.names(self.which)) if self.kind != "background" else ""
        return rng.choice(INSTRUCTIONS[self.kind]).format(thing=thing, value=self.value, to=to)

    def back(self) -> Edit:
        """The edit that undoes this one."""
        thing = self.source.things[self.which]
        place = next(name for name, center in PLACES.items() if center == thing.center)
        value = {"recolour": thing.color, "move": place, "background": self.source.background}
        return Edit(self.kind, value[self.kind], self.which, self.result, self.source)

    def shaken(self, rng: random.Random) -> Edit:
        """With the centres off their places as in any picture, the same in both scenes but for what is moved."""
        offsets = [(rng.gauss(0, JITTER), rng.gauss(0, JITTER)) for _ in self.source.things]
        source = _with_offsets(self.source, offsets)
        if self.kind == "move":
            offsets[self.which] = (0.0, 0.0)
        return replace(self, source=source, result=_with_offsets(self.result, offsets))


def _one_in_twenty(what: object) -> bool:
    return zlib.crc32(repr(what).encode()) % 20 == 0


def _with_offsets(scene: Scene, offsets: list[tuple[float, float]]) -> Scene:
    things = (
        replace(thing, center=(thing.center[0] + dx, thing.center[1] + dy))
        for thing, (dx, dy) in zip(scene.things, offsets, strict=True)
    )
    return replace(scene, things=tuple(things))


def sample_edit(rng: random.Random, scene: Scene, kind: str) -> Edit | None:
    """Draw something to ask of a scene; None if what was drawn cannot be asked: no room, or words that fit two things."""
    which = rng.randrange(len(scene.things)) if kind != "background" else 0
    thing, others = scene.things[which], scene.things[:which] + scene.things[which + 1 :]
    if kind == "background":
        value = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        return Edit(kind, value, which, scene, replace(scene, background=value))
    if kind == "recolour":
        value, where = rng.choice([name for name in COLORS if name != thing.color]), scene.where
        changed = replace(thing, color=value)
    else:
        value = rng.choice([name for name, center in PLACES.items() if center != thing.center])
        changed, where = replace(thing, center=PLACES[value]), "" if others else value
        for other in others:
            reach = APART * (SIZES[thing.size] + SIZES[other.size])
            if math.dist(changed.center, other.center) < reach:
                return None
    things = (*scene.things[:which], changed, *scene.things[which + 1 :])
    edit = Edit(kind, value, which, scene, replace(scene, things=things, where=where))
    return edit if edit.source.names(which) and edit.result.names(which) else None


def sample_edits(count: int, seed: int) -> list[tuple[Edit, str]]:
    """Draw held-out edits of each kind in turn, each with its instruction, the centres off their places."""
    rng, found, kinds = random.Random(seed), [], list(INSTRUCTIONS)
    while len(found) < count:
        edit = sample_edit(rng, sample_scene(rng), kinds[len(found) % len(kinds)])
        if edit and edit.held_out:
            found.append((edit.shaken(rng), edit.instruction(rng)))
    return found


def sample_families(count: int, seed: int) -> list[tuple[Edit, ...]]:
    """Draw scenes to train with: for each an edit of every kind; those and the ways back hold nothing that is held out."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng)
        edits = tuple(sample_edit(rng, scene, kind) for kind in INSTRUCTIONS)
        if all(edit and edit.trained and edit.back().trained for edit in edits):
            found.append(edits)
    return found


def encode_scenes(scenes: list[Scene]) -> torch.Tensor:
    """Pack scenes into numbers: [N, 1 + 2 * 5] = background, then (size, color, shape, x, y) a thing, size 0 = none."""
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    rows = []
    for scene in scenes:
        row = [float(backgrounds.index(scene.background))]
        for thing in scene.things:
            row += [
                SIZES[thing.size],
                colors.index(thing.color),
                SHAPES.index(thing.shape),
                *thing.center,
            ]
        rows.append(row + [0.0] * (11 - len(row)))
    return torch.tensor(rows)


def shape_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to every shape of unit radius, in SHAPES' order: [..., 6] for coordinates [...] (y down)."""
    radius = torch.hypot(x, y)
    square = torch.maximum(x.abs(), y.abs()) - 0.85
    # an upright triangle: three half planes at distance 0.55 from its centre
    triangle = torch.stack([y, -0.5 * y + 0.866 * x, -0.5 * y - 0.866 * x], -1).amax(-1) - 0.55
    # a five-pointed star: fold the angle into one half of one arm, then one line from tip to notch
    arm = torch.remainder(torch.atan2(x, -y) + torch.pi / 5, 2 * torch.pi / 5) - torch.pi / 5
    px, py = radius * torch.cos(arm), radius * torch.sin(arm).abs()
    tip, notch = (1.1, 0.0), (0.45 * 0.809, 0.45 * 0.588)
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    star = ((px - tip[0]) * ey - (py - tip[1]) * ex) / (ex * ex + ey * ey) ** 0.5
    bar = torch.maximum(x.abs() - 1.0, y.abs() - 0.33)
    cross = torch.minimum(bar, torch.maximum(y.abs() - 1.0, x.abs() - 0.33))
    ring = (radius - 0.72).abs() - 0.26
    return torch.stack([radius - 1.0, square, triangle, star, cross, ring], -1)


def render(
    rows: torch.Tensor, width: int = 256, height: int = 256, jitter: float = JITTER
) -> torch.Tensor:
    """Draw encoded scenes.

    Args:
        rows: [B, 11] from `encode_scenes`, on any device.
        width: in px.
        height: in px.
        jitter: standard deviation of each centre, as a share of the side.

    Returns:
        [B, 3, height, width] in -1..1, antialiased.
    """
    device, side = rows.device, min(width, height)
    palette = torch.tensor(list(COLORS.values()), device=device).float() / 127.5 - 1
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device).float() / 127.5 - 1
    ys, xs = torch.meshgrid(
        torch.arange(height, device=device) + 0.5,
        torch.arange(width, device=device) + 0.5,
        indexing="ij",
    )
    image = grounds[rows[:, 0].long()][:, :, None, None].expand(-1, -1, height, width)
    for first in (1, 6):
        size, color, shape, cx, cy = rows[:, first : first + 5].unbind(1)
        cx = (cx + jitter * torch.randn_like(cx)) * width
        cy = (cy + jitter * torch.randn_like(cy)) * height
        radius = (size * side).clamp_min(1e-3)[:, None, None]
        distance = shape_distances(
            (xs - cx[:, None, None]) / radius, (ys - cy[:, None, None]) / radius
        )
        index = shape.long()[:, None, None, None].expand(-1, height, width, 1)
        cover = (0.5 - distance.gather(-1, index)[..., 0] * radius).clamp(0, 1) * (size > 0)[
            :, None, None
        ]
        image = image + cover[:, None] * (palette[color.long()][:, :, None, None] - image)
    return image
