"""What every benchmark leaves: `results/<name>.json` in one form, and where it helps a bar chart."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

RESULTS = Path(__file__).resolve().parent / "results"


def row(case: str, ark: float, unit: str, n: int, peers: dict | None = None, floor: float | None = None, note: str = "") -> dict:  # fmt: skip
    """One case: Ark, its peers and the floor, all from the same run."""

    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    peers = {name: short(value) for name, value in (peers or {}).items()}
    return {"case": case, "ark": short(ark), "unit": unit, "peers": peers, "floor": short(floor), "n": n, "note": note}  # fmt: skip


def write_record(name: str, device: str, versions: dict[str, str], rows: list[dict], path: Path | None = None, **more: object) -> Path:  # fmt: skip
    """Write a benchmark's record, to `results/<name>.json` unless a path is given, and say where it is."""
    record = {"name": name, "date": datetime.date.today().isoformat(), "gpu": device, "versions": versions, **more, "rows": rows}  # fmt: skip
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def bar_chart(name: str, title: str, rows: list[dict]) -> Path:
    """Draw the rows of a record as bars, shorter is better, to `results/<name>.png`."""
    font, bars = ImageFont.load_default(15), []
    for item in rows:
        bars.append((item["case"], None, ""))
        values = {"Ark": item["ark"], **item["peers"], "floor": item["floor"]}
        bars += [(label, value, item["unit"]) for label, value in values.items() if value]
        bars.append(("", None, ""))
    height, left, width = 22, 190, 900
    picture = Image.new("RGB", (width, height * (len(bars) + 2)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font)
    longest = max(value for _, value, _ in bars if value)
    for line, (label, value, unit) in enumerate(bars, start=2):
        y = line * height
        draw.text((10 if value is None else 30, y), label, "black", font)
        if value is not None:
            end = left + max(1, (width - left - 110) * value / longest)
            color = {"Ark": (215, 80, 30), "floor": (190, 190, 190)}.get(label, (90, 120, 170))
            draw.rectangle((left, y + 3, end, y + height - 4), fill=color)
            draw.text((end + 6, y), f"{value:.3g} {unit}", "black", font)
    path = RESULTS / f"{name}.png"
    picture.save(path, optimize=True)
    return path
