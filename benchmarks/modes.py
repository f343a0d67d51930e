"""Equal pictures under the host's memory settings: `python benchmarks/modes.py --comfyui DIR [--folder DIR]`.

Real ComfyUI servers with `--lowvram`, `--highvram` and `--reserve-vram` (all but 6 GB), each once with ArkFastLoader
and once with the host's own loaders, the rest of the graph the same: two prompts, 1024x1024, 4 steps. Text encoder and
VAE calculate in fp32 (`--fp32-text-enc --fp32-vae`), which leaves them to the host on both sides: Ark's own engines
differ by the error of bf16; the cases without these flags show by how much. A row says how far the pictures are apart
at most, of 255. Random weights of the true shapes; needs a GPU, a ComfyUI of 0.33 or later and 17 GB of disk. `--tiny`
runs it with the embedded model, on a CPU too, to test the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import io
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image, ImageChops

from ark import bootstrap
from ark.benchmarks.first_image import EMBEDDED, FILES, STATIC, graph, node
from ark.benchmarks.models import (
    model_folder,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
    write_random,
)
from ark.benchmarks.record import row, write_record

LEFT = 6.0  # GB
FP32 = ["--fp32-text-enc", "--fp32-vae"]


def cases(tiny: bool) -> dict[str, list[str]]:
    """The server's flags by case; those that count the card's free memory have it alone."""
    if tiny:
        return {"default": FP32}
    total = torch.cuda.get_device_properties(0).total_memory / (1 << 30)
    reserve = ["--reserve-vram", f"{total - LEFT:.1f}"]
    return {
        "lowvram_static": ["--lowvram", *STATIC, *FP32],
        "highvram": ["--highvram", *FP32],
        "highvram_bf16": ["--highvram"],
        "reserve_static": [*reserve, *STATIC, *FP32],
        "reserve_dynamic": [*reserve, *FP32],
        "reserve_dynamic_bf16": reserve,
    }


def pictures(loader: str, flags: list[str], args: argparse.Namespace, folder: Path) -> list[Image.Image]:  # fmt: skip
    """What one server makes of two prompts."""
    folders = {} if args.tiny else {kind: [folder] for kind in ("diffusion_models", "text_encoders", "vae")}  # fmt: skip
    files, size = (EMBEDDED, 256) if args.tiny else (FILES, 1024)
    with bootstrap.Host.start(args.comfyui, extra_args=flags, model_folders=folders) as host:
        found = []
        for number in range(2):
            asked = graph(loader, files, size, f"picture {number}", number)
            asked["show"] = node("SaveImage", images=["decode", 0], filename_prefix="ark")
            found += bootstrap.Client(host.url).run(asked)["images"]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the files are made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny tests the script itself")
    loaders = ("ark", "ark") if args.tiny else ("ark", "comfyui")
    rows = []
    with model_folder(args.folder) as folder:
        if not args.tiny:
            write_random(folder / FILES["diffusion_model"], transformer_shapes())
            write_random(folder / FILES["text_encoder"], text_encoder_shapes())
            write_random(folder / FILES["vae"], vae_shapes(), torch.float32)

        def work(name: str, flags: list[str], at_once: int) -> None:
            with ThreadPoolExecutor(at_once) as pool:
                sides = pool.map(lambda loader: pictures(loader, flags, args, folder), loaders)
            differences = [ImageChops.difference(*pair) for pair in zip(*sides, strict=True)]
            most = max(value for picture in differences for _, value in picture.getextrema())
            rows.append(row(name, most, "of 255, at most", len(differences), note=" ".join(flags)))
            print(rows[-1], flush=True)

        for name, flags in cases(args.tiny).items():
            work(name, flags, 1 if name.startswith("reserve") else 2)
    if not args.tiny:
        known = (args.comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]
        versions = {"python": platform.python_version(), "torch": version("torch"), "comfyui": known}  # fmt: skip
        print(write_record("modes", torch.cuda.get_device_name(), versions, rows))


if __name__ == "__main__":
    main()
