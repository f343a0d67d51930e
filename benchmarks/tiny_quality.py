"""Does the embedded model draw what the prompt says, and edit what it is given? `python benchmarks/tiny_quality.py`.

Held-out captions (scenes that no training run ever saw, in any phrasing) are rendered in four steps by a real ComfyUI
server through Ark's nodes, and judged by `classifier.py`, which looks at pixels only. Held-out edits are of such scenes,
and what is asked of the thing is new too; their pictures are uploaded and go through `ark_edit_one_reference`. Prints the
share right a category, writes `results/tiny_quality.json` and two contact sheets. With `--captions 0` or `--edits 0` only
the other part runs, and nothing is recorded.

edit_recolour, edit_move, edit_background: what was asked is there. edit_kept: all else is as in the reference.
edit_all: both.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ark import bootstrap
from ark.assets import scenes
from ark.benchmarks.classifier import CATEGORIES, judge, judge_edit
from ark.benchmarks.record import RESULTS, row, write_record

EDIT_WORKFLOW = bootstrap.ROOT / "workflows" / "ark_edit_one_reference.json"


class Asker:
    """A server, and the bundled workflows for it."""

    def __init__(self, url: str):
        self.client = bootstrap.Client(url)
        info = self.client.object_info()
        self.graph, self.edit_graph = (
            bootstrap.to_api(json.loads(Path(path).read_text()), info)
            for path in (bootstrap.WORKFLOW, EDIT_WORKFLOW)
        )

    def draw(self, text: str, seed: int) -> np.ndarray:
        """A picture [H, W, 3] uint8 of a caption."""
        return self._run(self.graph, text, seed)

    def edit(self, text: str, seed: int, reference: np.ndarray) -> np.ndarray:
        """A picture [H, W, 3] uint8 of a reference after what the text asks."""
        stream = io.BytesIO()
        Image.fromarray(reference).save(stream, "PNG")
        name = self.client.upload(f"reference{seed}.png", stream.getvalue())
        return self._run(self.edit_graph, text, seed, LoadImage={"image": name})

    def _run(self, graph: dict, text: str, seed: int, **changes: dict) -> np.ndarray:
        graph = copy.deepcopy(graph)
        changes |= {"CLIPTextEncode": {"text": text}, "ArkSampler4Step": {"seed": seed}}
        for node in graph.values():
            node["inputs"].update(changes.get(node["class_type"], {}))
        (png,) = self.client.run(graph, timeout=300)["images"]
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def picture_of(scene: scenes.Scene) -> np.ndarray:
    """[256, 256, 3] uint8, every thing exactly at its centre."""
    (drawn,) = scenes.render(scenes.encode_scenes([scene]), jitter=0.0)
    return ((drawn + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int = 6) -> Image.Image:
    """Pictures with their captions beneath."""
    side, text = 170, 44
    wide = side * pictures[0].shape[1] // pictures[0].shape[0]
    rows = (len(pictures) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (wide + 10) + 10, rows * (side + text + 8) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = 10 + index % columns * (wide + 10), 10 + index // columns * (side + text + 8)
        sheet.paste(Image.fromarray(picture).resize((wide, side), Image.LANCZOS), (x, y))
        draw.rectangle((x, y, x + wide - 1, y + side - 1), outline=(200, 200, 200))
        words, lines = caption.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 27 * wide // side:
                lines.append("")
            lines[-1] += word + " "
        draw.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", spacing=1)
    return sheet


def draw_captions(asker: Asker, count: int, seed: int) -> list[dict]:
    """The rows of the captions."""
    asked, pictures, verdicts = scenes.sample_scenes(count, seed, held_out=True), [], []
    for index, (scene, caption) in enumerate(asked):
        pictures.append(asker.draw(caption, seed * 1000 + index))
        verdicts.append(judge(pictures[-1], scene))
        complain(index, caption, verdicts[-1])
    save_sheet("tiny_quality", pictures[:24], [caption for _, caption in asked[:24]])
    rows = [shares(name, [v[name] for v in verdicts if name in v]) for name in CATEGORIES]
    whole = [all(verdict.values()) for verdict in verdicts]
    return [*rows, shares("all", whole, "every category right")]


def make_edits(asker: Asker, count: int, seed: int) -> list[dict]:
    """The rows of the edits."""
    asked, pictures, verdicts = scenes.sample_edits(count, seed), [], []
    for index, (edit, instruction) in enumerate(asked):
        reference = picture_of(edit.source)
        made = asker.edit(instruction, seed * 1000 + index, reference)
        pictures.append(np.hstack([reference, made]))
        verdicts.append(judge_edit(made, reference, edit))
        complain(index, instruction, verdicts[-1])
    save_sheet("tiny_edits", pictures[:24], [instruction for _, instruction in asked[:24]], 4)
    kinds = [edit.kind for edit, _ in asked]
    rows = []
    for kind in scenes.INSTRUCTIONS:
        right = [v["asked"] for v, of in zip(verdicts, kinds, strict=True) if of == kind]
        rows.append(shares(f"edit_{kind}", right, "what was asked is there"))
    kept = [all(right for name, right in v.items() if name != "asked") for v in verdicts]
    rows.append(shares("edit_kept", kept, "all else is as in the reference"))
    whole = [all(verdict.values()) for verdict in verdicts]
    return [*rows, shares("edit_all", whole, "what was asked, and all else kept")]


def complain(index: int, text: str, verdict: dict[str, bool]) -> None:
    """Print what is wrong with a picture."""
    if wrong := [name for name, right in verdict.items() if not right]:
        print(f"{index}: {text}: wrong {', '.join(wrong)}", flush=True)


def shares(case: str, right: list[bool], note: str = "") -> dict:
    """A row, printed."""
    made = row(case, sum(right) / max(1, len(right)), "share", len(right), note=note)
    print(f"{case:16} {made['ark']:7.1%}  of {made['n']}", flush=True)
    return made


def save_sheet(name: str, pictures: list[np.ndarray], texts: list[str], columns: int = 6) -> None:
    """Write a contact sheet beside the record."""
    sheet = RESULTS / f"{name}.png"
    contact_sheet(pictures, texts, columns).save(sheet, optimize=True)
    print(f"contact sheet: {sheet}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--comfyui", help="a ComfyUI folder; else the one bootstrap finds")
    args = parser.parse_args()
    found = bootstrap.find_comfyui(args.comfyui)
    host_folder = found or bootstrap.Environment(Path(sys.prefix)).registry_host()
    rows = []
    with bootstrap.Host.start(host_folder) as host:
        asker = Asker(host.url)
        rows += draw_captions(asker, args.captions, args.seed) if args.captions else []
        rows += make_edits(asker, args.edits, args.seed) if args.edits else []
        stats = asker.client.get("/system_stats")
    if args.captions and args.edits:
        versions = {
            "python": platform.python_version(),
            "torch": version("torch"),
            "comfyui": stats["system"]["comfyui_version"],
        }
        print(write_record("tiny_quality", stats["devices"][0]["name"], versions, rows))


if __name__ == "__main__":
    main()
