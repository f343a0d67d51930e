"""The README's chart: `python benchmarks/chart.py` draws `results/overview.png` from the records that lie beside it.

Nothing is measured here, and no number is written here: a case that its record lacks is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ark.benchmarks.record import RESULTS

NAMES = {
    "ark": "Ark",
    "comfyui": "ComfyUI 0.33",
    "comfyui_static": "ComfyUI, no dynamic VRAM",
    "comfyui_dynamic": "ComfyUI",
    "comfyui_default": "ComfyUI's choice",
    "comfyui_compile": "TorchCompileModel",
    "ComfyUI": "ComfyUI 0.33",
    "runai": "runai streamer",
    "sage": "SageAttention 1",
}
ARK, PEER, TEXT, FAINT = (215, 80, 30), (90, 120, 170), (20, 20, 20), (110, 110, 110)
WIDTH, LEFT, RIGHT, LINE, FINE = (
    1200,
    330,
    250,
    24,
    2,
)  # px; drawn FINE times as large, for smooth edges


@dataclass(frozen=True)
class Shown:
    """One group of bars.

    Attributes:
        title: what was measured.
        record: whose file.
        case: the row.
        peers: shown beside Ark, by their names in the row.
        fp8: the row of the same in fp8, whose Ark is shown, too.
    """

    title: str
    record: str
    case: str
    peers: tuple[str, ...]
    fp8: str | None = None


GROUPS = (
    Shown("Queue to first image, fresh server", "first_image", "dynamic", ("comfyui_dynamic",)),
    Shown("Transformer, page cache to GPU", "load", "transformer_warm", ("safetensors", "runai")),
    Shown("A new prompt to conditioning", "text_encoder", "a new prompt", ("ComfyUI",)),
    Shown("Decode, 1024x1024", "vae", "decode 1024x1024", ("ComfyUI",)),
    Shown(
        "Queue to picture, a new prompt",
        "end_to_end",
        "new_prompt_bf16",
        ("comfyui_static", "comfyui_dynamic"),
        "new_prompt_fp8",
    ),  # fmt: skip
    Shown("Four steps, 1024x1024", "sampling", "t2i_1024_bf16", ("comfyui",), "t2i_1024_fp8"),
    Shown("Four steps, one reference image", "sampling", "edit1_bf16", ("comfyui",), "edit1_fp8"),
    Shown("Attention of one block, 1024x1024", "attention", "4608", ("comfyui_default", "sage")),
)


def row_of(record: str, case: str) -> dict:
    """A row of a record.

    Raises:
        KeyError: there is none.
    """
    rows = json.loads((RESULTS / f"{record}.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["case"] == case:
            return row
    raise KeyError(f"{record}.json has no case {case}")


@dataclass(frozen=True)
class Bar:
    """One bar; `floor` is what its work takes at least."""

    label: str
    value: float
    floor: float | None
    ours: bool


def bars_of(group: Shown) -> tuple[list[Bar], str]:
    """A group's bars and their unit."""
    row = row_of(group.record, group.case)
    bars = [Bar("Ark, bf16" if group.fp8 else "Ark", row["ark"], row["floor"], True)]
    if group.fp8:
        fp8 = row_of(group.record, group.fp8)
        bars.append(Bar("Ark, fp8 (lossy)", fp8["ark"], fp8["floor"], True))
    bars += [Bar(NAMES.get(name, name), row["peers"][name], None, False) for name in group.peers]
    return bars, row["unit"]


def draw(cards: set[str]) -> Image.Image:
    """The chart: each group at a scale of its own, shorter is better."""
    groups = [(group, *bars_of(group)) for group in GROUPS]
    height = LINE * (2 + sum(len(bars) + 1 for _, bars, _ in groups))
    picture = Image.new("RGB", (WIDTH * FINE, height * FINE), "white")
    pen = ImageDraw.Draw(picture)
    font, bold = (ImageFont.load_default(size * FINE) for size in (15, 16))

    def text(x: float, y: float, words: str, color: tuple[int, int, int], what=font, **how) -> None:  # noqa: ANN001
        pen.text((x * FINE, y * FINE), words, color, what, **how)

    text(16, 12, f"FLUX.2-Klein 4B on {', '.join(sorted(cards))}; shorter is better, each group at its own scale, | is the floor", TEXT, bold)  # fmt: skip
    y = 2.0 * LINE
    for group, bars, unit in groups:
        scale = (WIDTH - LEFT - RIGHT) / max(bar.value for bar in bars)
        text(16, y + 2, group.title, TEXT, bold)
        for bar in bars:
            end, color = LEFT + max(2.0, bar.value * scale), ARK if bar.ours else PEER
            pen.rectangle((LEFT * FINE, (y + 4) * FINE, end * FINE, (y + LINE - 4) * FINE), color)
            words = f"{bar.label}  {bar.value:.3g} {unit}"
            if bar.floor:
                x = (LEFT + bar.floor * scale) * FINE
                pen.line((x, (y + 2) * FINE, x, (y + LINE - 2) * FINE), TEXT, 2 * FINE)
                words += f"  (floor {bar.floor:.3g})"
            text(end + 8, y + 3, words, ARK if bar.ours else FAINT)
            y += LINE
        y += LINE
    return picture.resize((WIDTH, height), Image.Resampling.LANCZOS)


def main() -> None:
    cards = {json.loads((RESULTS / f"{group.record}.json").read_text(encoding="utf-8"))["gpu"] for group in GROUPS}  # fmt: skip
    path = RESULTS / "overview.png"
    draw(cards).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
