"""From Queue to the first image: `python benchmarks/first_image.py --comfyui DIR [--folder DIR] [--repeat 3]`.

A fresh server process for every trial, nothing loaded, the files warm, 1024x1024, 4 steps, real HTTP and websockets. The
graphs differ in the loader only: ArkFastLoader against the host's own three, each in both of the host's memory modes
(dynamic VRAM, its default, and static). After the first image the models are unloaded (`POST /free`) and a new prompt is
queued: what its encoding and sampling take longer than with everything loaded is the reload of text encoder and
transformer. Before each trial the files are read once, so that they are in the page cache; a server before the first trial
does as much for the libraries. Random weights of the true shapes; needs a
GPU, a ComfyUI of 0.33 or later and 17 GB of disk. `--tiny` runs Ark's part with the embedded model, on a CPU too, to test
the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import torch

from ark import bootstrap
from ark.benchmarks.models import (
    model_folder,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
    write_random,
)
from ark.benchmarks.record import bar_chart, row, write_record

STATIC = ["--disable-dynamic-vram"]
MODES = {
    "ark_static": STATIC,
    "comfyui_static": STATIC,
    "ark_dynamic": [],
    "comfyui_dynamic": [],
}
FILES = {
    "diffusion_model": "flux-2-klein-4b.safetensors",
    "text_encoder": "qwen_3_4b.safetensors",
    "vae": "flux2-vae.safetensors",
}
EMBEDDED = {
    "diffusion_model": "ark_tiny_klein.safetensors",
    "text_encoder": "ark_tiny_qwen3.safetensors",
    "vae": "ark_tiny_flux2_vae.safetensors",
}


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def graph(loader: str, files: dict[str, str], size: int, prompt: str, seed: int) -> dict:
    """Loader, prompt, four stock steps, decode, preview."""
    if loader == "ark":
        loaders = {"ark": node("ArkFastLoader", **files)}
        model, clip, vae = ["ark", 0], ["ark", 1], ["ark", 2]
    else:
        loaders = {
            "unet": node("UNETLoader", unet_name=files["diffusion_model"], weight_dtype="default"),
            "clip": node("CLIPLoader", clip_name=files["text_encoder"], type="flux2"),
            "vae": node("VAELoader", vae_name=files["vae"]),
        }
        model, clip, vae = ["unet", 0], ["clip", 0], ["vae", 0]
    return loaders | {
        "text": node("CLIPTextEncode", clip=clip, text=prompt),
        "latent": node("EmptyFlux2LatentImage", width=size, height=size, batch_size=1),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("BasicGuider", model=model, conditioning=["text", 0]),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Flux2Scheduler", steps=4, width=size, height=size),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=vae),
        "show": node("PreviewImage", images=["decode", 0]),
    }  # fmt: skip


def trial(loader: str, flags: list[str], args: argparse.Namespace, folder: Path, whole: bool = True) -> dict[str, float]:  # fmt: skip
    """One server's life: seconds to the first image, of a prompt with everything loaded, and of one after /free.

    It ends after the first image if it is not to be the whole.
    """
    kinds = ("diffusion_models", "text_encoders", "vae")
    folders = {} if args.tiny else {kind: [folder] for kind in kinds}
    files, size = (EMBEDDED, 256) if args.tiny else (FILES, 1024)
    for path in folder.glob("*.safetensors"):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    with bootstrap.Host.start(args.comfyui, extra_args=flags, model_folders=folders) as host:
        client = bootstrap.Client(host.url)
        client.object_info()  # as the canvas does before anybody queues
        time.sleep(3)  # nor does anybody queue sooner

        def run(number: int) -> tuple[float, float]:
            """Seconds to the image, and those of encoding and sampling, in which both large models are loaded."""
            asked = graph(loader, files, size, f"a picture of number {number}", number)
            # when the canvas has the image; what the server tidies up then is not counted
            ends: list[float] = []
            start = time.perf_counter()
            result = client.run(
                asked,
                lambda kind, _: kind == "execution_success" and ends.append(time.perf_counter()),
            )
            spent = result["node_seconds"]
            split = {name: round(value, 3) for name, value in spent.items() if value > 0.01}
            print(f"    {ends[0] - start:.3f} s of which {split}", flush=True)
            return ends[0] - start, spent["text"] + spent["sample"]

        first, _ = run(0)
        if not whole:
            return {}
        time.sleep(5)  # what was loaded is pinned at leisure meanwhile
        runs = [run(number) for number in (1, 2, 3)]
        loaded, busy = (statistics.median(values) for values in zip(*runs, strict=True))
        request = urllib.request.Request(
            f"{host.url}/free", json.dumps({"unload_models": True}).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=60).close()
        time.sleep(1.5)
        again, busy_again = run(4)
        for line in host.log.read_text(errors="replace").splitlines():
            if "Ark igniter" in line or "Ark loader" in line:
                print("   ", line)
    print(f"  first {first:.3f}  loaded {loaded:.3f}  after /free {again:.3f}", flush=True)
    return {"first": first, "loaded": loaded, "reload": busy_again - busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument(
        "--folder", type=Path, help="where the files are made and kept (default: temporary)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny tests the script itself")
    os.environ["ARK_EMBEDDINGS_GB"] = "0"  # each prompt is new to the machine
    modes = {"ark_dynamic": []} if args.tiny else MODES
    found: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    with model_folder(args.folder) as folder:
        if not args.tiny:
            write_random(folder / FILES["diffusion_model"], transformer_shapes())
            write_random(folder / FILES["text_encoder"], text_encoder_shapes())
            write_random(folder / FILES["vae"], vae_shapes(), torch.float32)
            trial("comfyui", STATIC, args, folder, whole=False)
        for turn in range(args.repeat):
            for name in list(modes)[:: 1 if turn % 2 == 0 else -1]:
                print(name, flush=True)
                found[name].append(trial(name.split("_")[0], modes[name], args, folder))
            if not args.tiny:  # after each turn, as a machine may be taken away
                record(found, args.comfyui)
    if args.tiny:
        print({what: median(found["ark_dynamic"], what) for what in ("first", "loaded", "reload")})


def median(trials: list[dict[str, float]], what: str) -> float:
    return statistics.median(times[what] for times in trials)


def record(found: dict[str, list[dict[str, float]]], comfyui: Path) -> None:
    """Write what was found so far."""
    turns = len(found["ark_static"])
    rows = []
    for mode in ("static", "dynamic"):
        ark, stock = (median(found[f"{loader}_{mode}"], "first") for loader in ("ark", "comfyui"))
        rows.append(row(mode, ark, "s", turns, {f"comfyui_{mode}": stock}))
    peers = {name: median(found[name], "reload") for name in ("comfyui_static", "comfyui_dynamic")}
    rows.append(row("reload_after_free", median(found["ark_dynamic"], "reload"), "s", turns, peers))
    for item in rows:
        print(item)
    known = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    versions = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "comfyui": known.split('"')[-2],
    }
    name = torch.cuda.get_device_name()
    print(write_record("first_image", name, versions, rows))
    print(bar_chart("first_image", f"Seconds from Queue to the first image ({name}), shorter is better", rows))  # fmt: skip


if __name__ == "__main__":
    main()
