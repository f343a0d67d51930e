"""What the doctor says: one line for each thing that it looked at; importing this needs nothing but Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: OK; NOTE for what costs speed or is only worth knowing; BAD for what does not work.
        text: what was found.
        remedy: what to do about it, if anything.
    """

    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """What to look at.

    Attributes:
        models: folders of model files.
        host: ComfyUI's version, None where none is known.
        device: that models run on, None for the doctor's own choice.
        measure: also read from the disk, and time what was not timed on this machine yet.
    """

    models: tuple[Path, ...] = ()
    host: str | None = None
    device: Any = None
    measure: bool = True


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: "2.11.0+cu130" is (2, 11, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
