"""The pictures of the registry's page: `python assets/brand.py` draws `icon.png` (square) and `banner.png` (21:9) anew.

A rainbow over a hull: four steps, the last one lit.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
NIGHT, STEEL, FIRE, PAPER = (18, 22, 30), (90, 120, 170), (215, 80, 30), (240, 238, 232)
FINE = 4  # drawn larger and scaled down, so that edges are smooth


def mark(size: int) -> Image.Image:
    """The sign alone, [size, size] px."""
    side = size * FINE
    picture = Image.new("RGB", (side, side), NIGHT)
    pen = ImageDraw.Draw(picture)
    width = side // 14
    for step in range(4):
        inset = side * (0.12 + 0.095 * step)
        box = (inset, inset + side * 0.06, side - inset, side - inset + side * 0.06)
        if step < 3:
            pen.arc(box, 180, 360, STEEL, width)
        else:
            pen.pieslice(box, 180, 360, FIRE)
    hull = [(0.12, 0.62), (0.88, 0.62), (0.74, 0.82), (0.26, 0.82)]
    pen.polygon([(x * side, y * side) for x, y in hull], PAPER)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def banner(width: int = 1260, height: int = 540) -> Image.Image:
    """The sign beside the name, [height, width] px."""
    picture = Image.new("RGB", (width, height), NIGHT)
    sign = mark(int(height * 0.7))
    picture.paste(sign, (int(height * 0.2), (height - sign.height) // 2))
    pen, left = ImageDraw.Draw(picture), int(height * 1.05)
    pen.text((left, height * 0.28), "Ark", PAPER, ImageFont.load_default(150))
    lines = ("FLUX.2-Klein in ComfyUI,", "loaded without a copy, drawn in four steps")
    for row, line in enumerate(lines):
        pen.text((left, height * (0.6 + 0.085 * row)), line, STEEL, ImageFont.load_default(33))
    return picture


if __name__ == "__main__":
    mark(400).save(HERE / "icon.png", optimize=True)
    banner().save(HERE / "banner.png", optimize=True)
