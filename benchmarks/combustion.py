"""Four steps with attention kernels and compiled blocks: `python benchmarks/combustion.py --comfyui DIR`.

One process with ComfyUI's real model object, Klein 4B's true shapes with random weights, 1024x1024, bf16: ComfyUI as it is,
its own TorchCompileModel, Ark's attention alone, and Ark's attention with compiled blocks, in turns. The first call of each
compiled one is timed, too; a second process (`--again`, started by the first), in which only Ark's own cache is left, shows
what that saves from the moment the weights are loaded, and counts what new sizes and LoRAs compile anew. What a server does
while it idles is done before. Needs a GPU and 8 GB of disk; `--tiny` runs it with the embedded model, on a CPU too, to test
the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ark.benchmarks.klein import four_steps, import_host, load_klein


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument(
        "--folder", type=Path, help="where the file is made and kept (default: temporary)"
    )
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--mode", default="default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def again(args: argparse.Namespace, folder: Path, size: int) -> dict:
    """A second process, in a graph's order: the first compiled image, then what new sizes and LoRAs compile."""
    import comfy.model_management
    import torch

    import ark.patches.sampling  # noqa: F401  # as a server has long done
    from ark.patches.attention import set_attention
    from ark.patches.compile import set_compile
    from ark.toolkit.compile import read_ahead

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ark").setLevel(logging.INFO)  # why something is traced anew
    read_ahead()  # as an idle server does
    model, width = load_klein(folder, args.tiny)
    start = time.perf_counter()
    patched, _, compiler = set_compile(set_attention(model, "auto")[0], args.mode)
    made = time.perf_counter()
    comfy.model_management.load_models_gpu([patched])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    compiler.wait()
    waited = time.perf_counter() - loaded
    image, _ = four_steps(patched, width, size)
    first, backend = time.perf_counter() - loaded, compiler.seconds
    second, _ = four_steps(patched, width, size)
    traced, found = compiler.graphs, compiler.found
    for other in (size - 64, size // 2, size + 64):
        four_steps(patched, width, other)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    shape = model.model.state_dict()[key].shape
    for strength in (1.0, 0.5):
        with_lora = patched.clone()
        with_lora.add_patches({key: ("diff", (torch.randn(shape) * 0.01,))}, strength)
        four_steps(with_lora, width, size)
    print(
        f"second process: nodes {made - start:.2f} s, weights to the device {loaded - made:.2f} s; from there to the first "
        f"image {first:.2f} s: {waited:.2f} s waiting for what is read in the background, {image:.2f} s the image "
        f"({backend:.2f} s of it the compiler's backend; the next image took {second:.2f} s); {traced} graphs traced, "
        f"{found} found"
    )
    return {"first": first, "traced": traced, "anew": compiler.graphs - traced}


def main() -> None:
    args = arguments()
    known, size = import_host(args.comfyui), 256 if args.tiny else 1024
    import torch

    from ark.benchmarks.models import model_folder

    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("this needs a GPU; --tiny tests the script itself")
    if args.again:
        with torch.inference_mode():
            found = again(args, args.again, size)
        (args.again / "again.json").write_text(json.dumps(found))
        return
    with model_folder(args.folder) as folder, torch.inference_mode():
        rows = measure(args, folder, size)
    for item in rows:
        print(item)
    if args.tiny:
        return
    from ark.benchmarks.record import bar_chart, write_record

    versions = {"python": platform.python_version(), "torch": torch.__version__, "comfyui": known}
    card = torch.cuda.get_device_name()
    print(write_record("combustion", card, versions, rows))
    print(bar_chart("combustion", f"Klein 4B, bf16, 1024x1024, ms ({card}), shorter is better", rows))  # fmt: skip


def measure(args: argparse.Namespace, folder: Path, size: int) -> list[dict]:
    """The cases in turns, then the second process."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    from ark.benchmarks.record import row
    from ark.patches.attention import set_attention
    from ark.patches.compile import set_compile

    model, width = load_klein(folder, args.tiny)
    attention, report = set_attention(model, "auto")
    print(report)
    compiled, _, _ = set_compile(attention, args.mode)
    theirs = model.clone()  # as the node TorchCompileModel does
    skip = {"guard_filter_fn": lambda guards: ["transformer_options" not in g.name for g in guards]}
    set_torch_compile_wrapper(model=theirs, backend="inductor", options=skip)
    models = {"comfyui_static": model, "ark_attention": attention, "ark_compiled": compiled, "comfyui_compile": theirs}  # fmt: skip
    first = {}
    for name, patched in models.items():
        first[name] = 1e3 * four_steps(patched, width, size)[0]
        print(f"{name}: first call {first[name]:.0f} ms", flush=True)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.repeat):
        for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(1e3 * four_steps(models[name], width, size, turn)[0])
    median = {name: statistics.median(values) for name, values in times.items()}
    print({name: round(value, 1) for name, value in median.items()}, flush=True)
    command = [sys.executable, __file__, "--comfyui", args.comfyui, "--again", folder, "--mode", args.mode]  # fmt: skip
    with tempfile.TemporaryDirectory() as empty:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        subprocess.run([str(p) for p in command] + ["--tiny"] * args.tiny, check=True, env=env)
    second = json.loads((folder / "again.json").read_text())
    peers = {name: median[name] for name in ("comfyui_static", "comfyui_compile")}
    note = f"from loaded weights to the latents; {second['traced']} graphs traced, {second['anew']} more for new sizes and LoRAs"  # fmt: skip
    return [
        row("attention_only", median["ark_attention"], "ms", args.repeat, peers),
        row("attention_compile", median["ark_compiled"], "ms", args.repeat, peers),
        row("second_process_first_image", 1e3 * second["first"], "ms", 1,
            {"first_process": first["ark_compiled"], "comfyui_compile": first["comfyui_compile"]}, note=note),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
