"""What Ark does on your card, in one short run: `python bootstrap.py bench [--quick] [--out FILE]`.

A model's file to the device, attention, and four steps at 1024x1024: Ark against safetensors, against the attention that
ComfyUI takes by itself, and against ComfyUI's own step; the floors from the same run. With your own Klein file, if ComfyUI
has one, else with random weights of the true shapes (8 GB of disk). Prints a table and writes one JSON value (gpu, driver,
versions, rows), which `--against` shows beside another's. Needs an NVIDIA GPU; `--tiny` runs it at small size with the
embedded model, on a CPU too, to see that it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

SIZE = 1024  # px
ROOM = 9 << 30  # bytes that random weights want on the disk
TINY = {"size": 128, "heads": 2, "tokens": 64}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bootstrap.py bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--quick", action="store_true", help="fewer turns, no fp8, nothing cold")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("ark-bench.json"), help="default: ark-bench.json")  # fmt: skip
    parser.add_argument("--diffusion-model", type=Path, metavar="FILE", help="default: ComfyUI's Klein, else random weights")  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where random weights are made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="JSON", help="earlier results, or others', shown beside this one")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="try it without a GPU")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    others = [json.loads(path.read_text(encoding="utf-8")) for path in args.against]
    import torch

    if not torch.cuda.is_available() and not args.tiny:
        print("There is no NVIDIA GPU that torch can use: nothing here is worth comparing.\n`python bootstrap.py doctor` says "
              "why; --tiny runs it all on the CPU at small size, to see that it works.", file=sys.stderr)  # fmt: skip
        return 1
    from ark.benchmarks.klein import import_host
    from ark.benchmarks.models import model_folder, transformer_shapes, write_random
    from ark.benchmarks.record import write_record
    from ark.toolkit.driver import ask_driver
    from ark.toolkit.embedded import ASSETS
    from ark.toolkit.hardware import probe_hardware

    host = import_host(args.comfyui)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    hardware = probe_hardware(device)
    path = args.diffusion_model or (own_file(args.comfyui) if not args.tiny else None)
    with model_folder(args.folder) as folder:
        if args.tiny:
            path = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
        elif path is None:
            path = folder / "flux-2-klein-4b.safetensors"
            if not path.exists() and shutil.disk_usage(folder).free < ROOM:
                print(f"{folder} has no room for {ROOM >> 30} GB of random weights: name another one with --folder, or your file with --diffusion-model.", file=sys.stderr)  # fmt: skip
                return 1
            print("Writing random weights of Klein 4B's shapes", flush=True)
            write_random(path, transformer_shapes())
        rows, left_out = measure(path, device, args)
    versions = {"ark": ark_version(), "python": platform.python_version(), "torch": torch.__version__, "comfyui": host, **dict(hardware.packages)}  # fmt: skip
    more = {"driver": ask_driver().version, "on": platform.platform(), "processors": os.cpu_count(), "file": path.name, "tiny": args.tiny, "left_out": left_out}  # fmt: skip
    write_record("bench", hardware.name, versions, rows, args.out, **more)
    print(table([json.loads(args.out.read_text(encoding="utf-8")), *others]))
    print(f"result: {args.out.absolute()}")
    return 0 if rows else 1


def ark_version() -> str:
    from ark.toolkit.doctor import ark_version

    return ark_version()


def own_file(comfyui: Path) -> Path | None:
    """The user's Klein, None if there is none."""
    from ark.toolkit.disk import WHOLE, find_model

    path = find_model([comfyui / "models" / "diffusion_models"])
    fits = path is not None and "klein" in path.name.lower() and path.stat().st_size >= WHOLE
    return path if fits else None


def measure(path: Path, device, args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:  # noqa: ANN001
    """The rows, and why a part is not among them."""
    import torch

    rows: list[dict] = []
    left_out: dict[str, str] = {}
    parts: dict[str, Callable[[], list[dict]]] = {
        "load": lambda: load(path, device, args),
        "attention": lambda: attention(device, args),
        "sampling": lambda: sampling(path, args, left_out),
    }
    for name, part in parts.items():
        print(f"--- {name}", flush=True)
        try:
            with torch.inference_mode():
                rows += part()
        except Exception as error:  # the other parts are worth having
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"left out: {left_out[name]}", flush=True)
    return rows, left_out


def load(path: Path, device, args: argparse.Namespace) -> list[dict]:  # noqa: ANN001
    """File to device: out of the page cache, and from the disk."""
    from safetensors.torch import load_file

    from ark.benchmarks.load import ark_load, drop_from_cache, interleaved, unpin
    from ark.benchmarks.record import row
    from ark.toolkit.disk import read_speed
    from ark.toolkit.rates import link_rate

    size, turns = path.stat().st_size, 3 if args.quick else 5
    works = {
        "ark": lambda: ark_load(path, device),
        "safetensors": lambda: load_file(path, device=str(device)),
    }
    for work in works.values():
        unpin()
        work()
    link, note = link_rate(device), f"{size / 1e9:.2f} GB"
    found = interleaved(works, turns, device, unpin)
    rows = [row("load_warm", found.pop("ark"), "s", turns, found, link and size / link, note)]
    if not args.quick and hasattr(os, "posix_fadvise"):

        def cold() -> None:
            unpin()
            drop_from_cache(path)

        cold()
        raw = size / read_speed(path, size, float("inf")).rate
        found = interleaved(works, 2, device, cold)
        rows.append(row("load_cold", found.pop("ark"), "s", 2, found, raw, note))
    return rows


def attention(device, args: argparse.Namespace) -> list[dict]:  # noqa: ANN001
    """One block's attention at 1024x1024, by every kernel that runs here."""
    import torch

    from ark.benchmarks import attention
    from ark.toolkit.architecture import HEAD_DIM, USUAL_HEADS, USUAL_TOKENS
    from ark.toolkit.hardware import probe_hardware

    heads, tokens = (TINY["heads"], TINY["tokens"]) if args.tiny else (USUAL_HEADS, USUAL_TOKENS)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = attention.measure(probe_hardware(device), device, (1, heads, tokens, HEAD_DIM), dtype, 1 if args.quick else 3)  # fmt: skip
    return [{**found, "case": f"attention_{found['case']}"}]


def sampling(path: Path, args: argparse.Namespace, left_out: dict[str, str]) -> list[dict]:
    """Four steps: ComfyUI's own step and Ark's fused one, in turns."""
    import torch

    from ark.benchmarks.klein import floor, four_steps
    from ark.benchmarks.record import row
    from ark.patches.attention import set_attention
    from ark.patches.fused import engine_on, set_fused
    from ark.patches.transformer import load_transformer
    from ark.patches.warmup import choose_matrices
    from ark.toolkit.errors import InputError

    size, turns = TINY["size"] if args.tiny else SIZE, 3 if args.quick else 10
    model, dims = load_transformer(path)
    choose_matrices(model, lambda: False)
    models = {"comfyui": model, "bf16": set_fused(set_attention(model, "auto")[0], "bf16")[0]}
    try:
        if not args.quick:  # a model of its own, as its weights leave the device
            models["fp8"] = set_fused(set_attention(load_transformer(path)[0], "auto")[0], "fp8")[0]
    except InputError as error:
        left_out["fp8"] = error.reason
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(2 + turns):  # the first two load, choose and record
        for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
            seconds, _ = four_steps(models[name], dims.context_dim, size, seed=turn)
            times[name] += [1e3 * seconds] * (turn > 1)
        print(f"  {turn}  " + "  ".join(f"{name} {values[-1]:.1f} ms" for name, values in times.items() if values), flush=True)  # fmt: skip
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for precision in [name for name in models if name != "comfyui"]:
        engine = engine_on(models[precision])
        lowest = floor(engine, models[precision], size) if torch.cuda.is_available() else None
        rows.append(row(f"t2i_{size}_{precision}", median[precision], "ms", turns, {"comfyui": median["comfyui"]}, lowest, str(engine.runner)))  # fmt: skip
    return rows


def table(records: list[dict]) -> str:
    """Records beside each other: what each measured of Ark, and of the first one peers and floors, too."""
    lines = [f"{number}: {record['gpu']}, torch {record['versions'].get('torch')}, {record['date']}{', TINY' * record.get('tiny', False)}" for number, record in enumerate(records)]  # fmt: skip
    lines.append(f"{'case':<18}{'unit':<5}" + "".join(f"{f'ark {n}':>10}" for n in range(len(records))) + f"{'floor':>10}  others")  # fmt: skip
    for item in records[0]["rows"]:
        values = [next((row["ark"] for row in record["rows"] if row["case"] == item["case"]), None) for record in records]  # fmt: skip
        cells = "".join(f"{'-' if v is None else f'{v:.3f}':>10}" for v in [*values, item["floor"]])
        peers = ", ".join(f"{name} {value:.3f}" for name, value in item["peers"].items())
        lines.append(f"{item['case']:<18}{item['unit']:<5}{cells}  {peers}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
