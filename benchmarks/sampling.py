"""Four steps with the fused engine: `python benchmarks/sampling.py --comfyui DIR [--folder DIR] [--repeat 10]`.

One process with ComfyUI's real model object, Klein 4B's true shapes with random weights: ComfyUI as it is against the
fused engine in bf16, fp8, and with the kernels that run by name only, where they are installed, in turns, at several sizes,
as a batch, and editing with one reference. The floor, from the same run: the model's own matrices by the library's GEMM, and
cuDNN's attention, nothing else. Then the numbers: how far the latents are from those in fp32. Two processes more show the first image with an
empty cache of kernels and with a warm one. Needs a GPU and 8 GB of disk; `--tiny` runs it with the embedded model, on a
CPU too, to test the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ark.benchmarks.klein import STEPS, floor, four_steps, import_host, in_fp32, load_klein

CASES = {
    "t2i_1024": {"size": 1024},
    "t2i_512": {"size": 512},
    "t2i_1536": {"size": 1536},
    "batch4": {"size": 1024, "batch": 4},
    "edit1": {"size": 1024, "references": 1},
}
TINY = {name: {**how, "size": 128} for name, how in CASES.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the file is made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--first", choices=("bf16", "fp8"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    known = import_host(args.comfyui)
    import torch

    from ark.benchmarks.models import model_folder
    from ark.benchmarks.record import RESULTS, bar_chart, write_record

    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("this needs a GPU; --tiny tests the script itself")
    with model_folder(args.folder) as folder, torch.inference_mode():
        if args.first:
            print(json.dumps(first_image(folder, args)))
            return
        rows, profile = measure(folder, args)
    if args.tiny:
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "comfyui": known}
    card = torch.cuda.get_device_name()
    print(write_record("sampling", card, versions, rows))
    (RESULTS / "sampling_profile.txt").write_text(profile, encoding="utf-8")
    timed = [row for row in rows if row["unit"] == "ms"]
    print(bar_chart("sampling", f"Klein 4B, {STEPS} steps, ms ({card}), shorter is better", timed))


def first_image(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """What a fresh process takes once the model is on the device, ms: to be ready, for its first images, and for later ones.

    In a graph the engine gets ready while the text is encoded.
    """
    import comfy.model_management

    from ark.patches import warmup
    from ark.patches.attention import set_attention
    from ark.patches.fused import set_fused

    model, width = load_klein(folder, args.tiny)
    patched, _ = set_fused(set_attention(model, "auto")[0], args.first)
    comfy.model_management.load_models_gpu([patched])
    start = time.perf_counter()
    warmup.settle()
    ready = 1e3 * (time.perf_counter() - start)
    how = (TINY if args.tiny else CASES)["t2i_1024"]
    times = [1e3 * four_steps(patched, width, seed=seed, **how)[0] for seed in range(6)]
    return {
        "ready": ready,
        "first": times[0],
        "second": times[1],
        "steady": statistics.median(times[2:]),
    }


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[dict], str]:
    """The rows, and a table of kernels."""
    import torch

    from ark.benchmarks.models import by_name
    from ark.benchmarks.record import row
    from ark.patches.attention import set_attention
    from ark.patches.fused import engine_on, set_fused
    from ark.patches.warmup import choose_matrices

    model, width = load_klein(folder, args.tiny)
    print(set_attention(model, "auto")[1])
    choose_matrices(model, lambda: False)  # as a server does that has nothing to do
    device = torch.device(model.load_device)

    def fused(precision: str, kernel: str = "auto"):  # noqa: ANN202
        """On a model of its own: as in a server, none is set up anew for another one's turn."""
        return set_fused(set_attention(load_klein(folder, args.tiny)[0], kernel)[0], precision)[0]

    models = {"comfyui": model, "bf16": fused("bf16"), "fp8": fused("fp8")}
    models |= {name: fused(*how) for name, how in by_name(device).items()}
    engines = {name: engine_on(m) for name, m in models.items() if name != "comfyui"}
    rows: list[dict] = []

    def add(*item, **more) -> None:
        rows.append(row(*item, **more))
        print(rows[-1], flush=True)

    cases = TINY if args.tiny else CASES
    for m in models.values():  # what was sent ahead is the host's from then on, which unloads it
        four_steps(m, width, **cases["t2i_512"])
    for case, how in cases.items():
        peak = {name: _peak(lambda m=m, how=how: four_steps(m, width, **how)) for name, m in models.items()}  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(args.repeat):
            for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(1e3 * four_steps(models[name], width, seed=turn, **how)[0])
        median = {name: statistics.median(values) for name, values in times.items()}
        for precision, engine in engines.items():
            lowest = floor(engine, models[precision], **how) if torch.cuda.is_available() else None
            note = (
                f"{engine.runner}; peak {peak[precision]:.2f} GB, ComfyUI {peak['comfyui']:.2f} GB"
            )
            add(f"{case}_{precision}", median[precision], "ms", args.repeat, {"comfyui": median["comfyui"]}, lowest, note)  # fmt: skip
    profile = "\n\n".join(f"{name}\n{_profile(m, width, args.tiny)}" for name, m in models.items())
    print(profile)
    how = cases["t2i_1024"]
    latents = {name: four_steps(m, width, **how)[1] for name, m in models.items()}
    for state, precision, found in first_images(folder, args):
        note = f"ready after {found['ready']:.0f} ms, in a graph while the text is encoded; steady in that process: {found['steady']:.1f} ms; second image {found['second']:.1f} ms"
        add(f"first_image_{state}_cache_{precision}", found["first"], "ms", 1, note=note)
    exact = four_steps(in_fp32(model), width, **how)[1]
    errors = {name: float((x - exact).norm() / exact.norm()) for name, x in latents.items()}
    for precision in engines:
        add(f"latents_error_{precision}", errors[precision], "relative to fp32", 1, {"comfyui": errors["comfyui"]})  # fmt: skip
    return rows, profile


def first_images(folder: Path, args: argparse.Namespace):  # noqa: ANN201
    """Fresh processes, with an empty cache of kernels and then with what the first one left."""
    for precision in ("bf16", "fp8"):
        with tempfile.TemporaryDirectory() as empty:
            env = {**os.environ, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, "--comfyui", args.comfyui, "--folder", folder, "--first", precision]  # fmt: skip
            for state in ("cold", "warm"):
                run = subprocess.run([str(p) for p in command] + ["--tiny"] * args.tiny, env=env, check=True, capture_output=True, text=True)  # fmt: skip
                yield state, precision, json.loads(run.stdout.splitlines()[-1])


def _peak(work) -> float:  # noqa: ANN001
    """GB that torch has allocated at most while some work is repeated, with no other model on the device."""
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()
    work()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        work()
    return torch.cuda.max_memory_allocated() / 1e9


def _profile(model, width: int, tiny: bool) -> str:  # noqa: ANN001
    """Kernels of one image by their time on the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        four_steps(model, width, **(TINY if tiny else CASES)["t2i_1024"])
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=70)


if __name__ == "__main__":
    main()
