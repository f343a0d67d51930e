"""What is to be made: one picture's prompt and settings, from the command line or from a line of a file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .architecture import SPATIAL_FACTOR
from .errors import InputError
from .schedule import MAX_STEPS

MAX_SIDE = 16384  # px
REFERENCE_AREA = 1024 * 1024  # px; diffusers reduces larger references to it
REFERENCE_SIDE = 64  # px at least, diffusers' limit
REFERENCE_RATIO = 8  # longer to shorter side at most, diffusers' limit
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF: how a camera was held
FIELDS: dict[str, Any] = {
    "prompt": str,
    "seed": int,
    "size": str,
    "steps": int,
    "image": (str, list),
}


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        prompt: what it shows.
        seed: of its noise, see `noise.py`.
        width: px, a multiple of 16.
        height: px, a multiple of 16.
        steps: Euler steps.
        images: paths of the references to edit, in order.
    """

    prompt: str
    seed: int = 0
    width: int = 1024
    height: int = 1024
    steps: int = 4
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("The prompt is empty.", "Say what the picture shows.")
        if any("\ud800" <= c <= "\udfff" for c in self.prompt):
            raise InputError("The prompt is not whole Unicode text.", "Write it in UTF-8.")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"The seed is {self.seed}.", "Choose 0 to 2**64 - 1.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise InputError(
                f"steps is {self.steps}.", f"Choose 1 to {MAX_STEPS}; Klein is made for 4."
            )
        parse_size(f"{self.width}x{self.height}")

    def digest(self, settings: Mapping[str, Any]) -> str:
        """A short name for this picture made with some settings; another one whenever anything differs (of references, the path)."""
        text = json.dumps([asdict(self), dict(settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_size(text: str) -> tuple[int, int]:
    """Read `WxH` in px.

    Raises:
        InputError: it is no size, or not of multiples of 16.
    """
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip().lower())
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    sides = (width, height)
    if not match or any(not SPATIAL_FACTOR <= s <= MAX_SIDE or s % SPATIAL_FACTOR for s in sides):
        nearest = "x".join(str(max(1, round(s / SPATIAL_FACTOR)) * SPATIAL_FACTOR) for s in sides)
        raise InputError(
            f"{text!r} is no size: WIDTHxHEIGHT in multiples of {SPATIAL_FACTOR}.",
            f"Choose {nearest}." if match and max(sides) <= MAX_SIDE else "For example 1024x768.",
        )
    return width, height


def size_of_reference(path: str | Path) -> tuple[int, int]:
    """The size that an edit of a picture has unless another one is asked for: its own, as diffusers reduces it.

    Raises:
        InputError: it is no picture, or none that diffusers takes.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION) in QUARTER_TURNS:
                width, height = height, width
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read ({error}).", "Name a PNG or JPEG file.") from error  # fmt: skip
    if min(width, height) < REFERENCE_SIDE:
        raise InputError(f"{path} is too small.", f"References have at least {REFERENCE_SIDE} px on each side.")  # fmt: skip
    if max(width, height) > REFERENCE_RATIO * min(width, height):
        raise InputError(f"{path} is too narrow.", f"References are at most {REFERENCE_RATIO} times as long as wide.")  # fmt: skip
    share = min(1.0, math.sqrt(REFERENCE_AREA / (width * height)))
    width, height = (int(side * share) // SPATIAL_FACTOR * SPATIAL_FACTOR for side in (width, height))  # fmt: skip
    return width, height


def with_size(job: Job, size: tuple[int, int] | None, usual: tuple[int, int]) -> Job:
    """The job at the size asked for, else at its first reference's, else at the model's usual one."""
    width, height = size or (size_of_reference(job.images[0]) if job.images else usual)
    return replace(job, width=width, height=height)


def read_prompts(path: Path, common: Mapping[str, Any], usual: tuple[int, int]) -> list[Job]:
    """Read a file of prompts, one JSON value a line: a text, or a table with prompt, seed, size, steps and image.

    Args:
        path: of the file. Blank lines are passed over; paths of images are relative to its folder.
        common: what lines that do not say have: seed (of the first line, one more for each that follows), size, steps,
            images.
        usual: the size if none is said at all.

    Returns:
        One job a line, in order.

    Raises:
        InputError: a line is broken; its number is in the text. All lines are read before.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}).", "Name a text file in UTF-8."
        ) from error
    jobs: list[Job] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            jobs.append(
                _job(line, path.parent, {**common, "seed": common["seed"] + len(jobs)}, usual)
            )
        except InputError as error:
            raise InputError(
                f"{path.name}, line {number}: {error.reason}", f"{error.remedy} Nothing was made."
            ) from error
    if not jobs:
        raise InputError(
            f"{path} has no prompts.", 'Write one a line, such as {"prompt": "a fox"}.'
        )
    return jobs


def _job(line: str, folder: Path, common: Mapping[str, Any], usual: tuple[int, int]) -> Job:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON ({error}).", "Correct the line.") from error
    value = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise InputError("there is no prompt.", 'Write a text, or {"prompt": TEXT}.')
    for name, given in value.items():
        if name not in FIELDS:
            raise InputError(
                f"it has {name!r}, which is not known.", f"Known are {', '.join(FIELDS)}."
            )
        if not isinstance(given, FIELDS[name]) or isinstance(given, bool):
            raise InputError(f"{name} is {given!r}.", "Correct its type.")
    if "image" in value:
        images = [value["image"]] if isinstance(value["image"], str) else value["image"]
        images = tuple(str(folder / str(image)) for image in images)
    else:
        images = tuple(common["images"])
    check_images(images)
    job = Job(
        value["prompt"], value.get("seed", common["seed"]), steps=value.get("steps", common["steps"]), images=images
    )  # fmt: skip
    size = parse_size(value["size"]) if "size" in value else common["size"]
    return with_size(job, size, usual)


def check_images(images: tuple[str, ...]) -> None:
    """Raise InputError if one of some references cannot be used."""
    for image in images:
        size_of_reference(image)
