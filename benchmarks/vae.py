"""Latents to a picture and back: `python benchmarks/vae.py --comfyui DIR`.

One process with ComfyUI's real VAE object, FLUX.2's true shapes with random weights, bf16: ComfyUI's own modules and Ark's
engine, in turns. From latents on the host to an IMAGE on the host, and back; the floor is the convolutions and matrices of
the engine alone, each by the library at its exact shape. Then what each variant of the engine takes on the device, and a
profile by kernel. Needs a GPU; `--tiny` runs it with the embedded model, on a CPU too, to test the benchmark itself (then
nothing is recorded).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ark.benchmarks.klein import import_host

CASES = {
    "decode 1024x1024": ("decode", 1, 1024),
    "encode 1024x1024": ("encode", 1, 1024),
    "decode 512x512": ("decode", 1, 512),
    "encode 512x512": ("encode", 1, 512),
    "decode 1536x1536": ("decode", 1, 1536),
    "decode 1024x1024, batch 4": ("decode", 4, 1024),
}
LIBRARY = {"conv2d", "convolution", "cudnn_convolution", "linear", "matmul", "mm", "addmm", "addmm_", "scaled_dot_product_attention"}  # fmt: skip
VARIANTS = {
    "decode": [{}, {"fold": False}, {"tune": True}, {"fold": False, "tune": True}, {"attention": "rows_half"}, {"attention": "sdpa"}, {"band": 1 << 18}],
    "encode": [{}, {"tune": True}, {"attention": "rows_half"}, {"attention": "sdpa"}, {"band": 1 << 18}],
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the file is made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--profile", type=int, default=25, help="kernels to list of each way")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def load(folder: Path, tiny: bool):  # noqa: ANN201
    """The VAE on its device, and its module in fp32."""
    import comfy.model_management
    import torch

    from ark.benchmarks.models import vae_shapes, write_random
    from ark.patches import vae_engine
    from ark.patches.vae import load_vae
    from ark.patches.warmup import settle
    from ark.toolkit.embedded import ASSETS

    path = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"
    if not tiny:
        path = write_random(folder / "flux2-vae.safetensors", vae_shapes(), torch.float32)
    vae, _ = load_vae(path)
    if vae.device.type != "cuda":  # the engine is made for GPUs
        vae_engine.DEVICES, vae_engine.DTYPES = (vae.device.type,), (vae.vae_dtype,)
    settle()
    comfy.model_management.load_models_gpu([vae.patcher])
    model = vae.first_stage_model
    apart = {name: vars(model).pop(name) for name in ("decode", "encode", "ark_masters")}
    exact = copy.deepcopy(model).float()
    vars(model).update(apart)
    return vae, exact


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Milliseconds until the device is done."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return (time.perf_counter() - start) * 1e3


def input_for(way: str, batch: int, size: int):  # noqa: ANN201
    """Latents as the sampler gives them, or an IMAGE, on the host."""
    import torch

    if way == "decode":
        return torch.randn(batch, 128, size // 16, size // 16)
    return torch.rand(batch, size, size, 3)


def measure(vae, way: str, given, repeat: int) -> dict[str, list[float]]:  # noqa: ANN001
    """Milliseconds by who works, A B B A; the first three rounds load kernels and record."""
    engine, times = vae.engine, {"Ark": [], "ComfyUI": []}
    for number in range(repeat + 3):
        for name in ("Ark", "ComfyUI") if number % 2 else ("ComfyUI", "Ark"):
            vae.engine = engine if name == "Ark" else None
            times[name].append(timed(lambda: getattr(vae, way)(given)))
    vae.engine = engine
    return {name: ms[3:] for name, ms in times.items()}


def peaks(vae, way: str, given) -> dict[str, float]:  # noqa: ANN001
    """GB that each needs beside the weights, at most; Ark without its recordings."""
    import torch

    if not torch.cuda.is_available():
        return {}
    engine, found = vae.engine, {}
    engine.graphs.clear()
    for name in ("Ark", "ComfyUI"):
        vae.engine = engine if name == "Ark" else None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(vae, way)(given)
        found[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    vae.engine = engine
    return found


def errors(vae, exact, way: str, given) -> dict[str, float]:  # noqa: ANN001
    """How far each is off the host's module in fp32, relative."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # of the best only, all else is in bf16
    if way == "decode":
        best = vae.process_output(exact.decode(given.to(vae.device)).float()).movedim(1, -1)
    else:
        best = exact.encode(vae.process_input(given.to(vae.device)).movedim(-1, 1))
    engine, found = vae.engine, {}
    for name in ("Ark", "ComfyUI"):
        vae.engine = engine if name == "Ark" else None
        result = getattr(vae, way)(given).to(best.device)
        found[name] = float((result - best).norm() / best.norm())
    vae.engine = engine
    return found


def on_device(vae, way: str, given, choices: dict):  # noqa: ANN001, ANN201
    """A function that runs the engine's variant on what is on the device already."""
    engine = vae.engine
    x = given.to(vae.device) if way == "decode" else vae.process_input(given.to(vae.device))
    usual = engine.choices

    def work(lasting: bool = True):  # noqa: ANN202
        engine.choices = dataclasses.replace(usual, **choices)
        try:
            return getattr(engine, way)(engine.record(way), x, lasting=lasting)
        finally:
            engine.choices = usual

    return work


def floor(vae, way: str, given) -> dict[str, float]:  # noqa: ANN001
    """Milliseconds of the convolutions and of the matrices that the engine runs, each alone."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, list] = {}

    def described(value):  # noqa: ANN001, ANN202
        is_tensor = torch.is_tensor(value)
        return (tuple(value.shape), value.stride(), value.dtype, value.device) if is_tensor else value  # fmt: skip

    def made(value):  # noqa: ANN001, ANN202
        if not (isinstance(value, tuple) and len(value) == 4 and isinstance(value[2], torch.dtype)):
            return value
        return torch.empty_strided(*value[:2], dtype=value[2], device=value[3]).normal_()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202, D102
            if func.overloadpacket.__name__ in LIBRARY:
                given = [described(a) for a in args], {k: described(v) for k, v in (kwargs or {}).items()}  # fmt: skip
                calls.setdefault(f"{func} {given}", [0, func, *given])[0] += 1
            return func(*args, **(kwargs or {}))

    with Listen():
        on_device(vae, way, given, {})(lasting=False)
    found = {"convolutions": 0.0, "matrices": 0.0}
    for count, func, described_args, described_kwargs in calls.values():
        args, kwargs = [made(a) for a in described_args], {k: made(v) for k, v in described_kwargs.items()}  # fmt: skip
        ms = [timed(lambda f=func, a=args, k=kwargs: [f(*a, **k) for _ in range(10)]) / 10 for _ in range(3)]  # fmt: skip
        found["convolutions" if "conv" in str(func) else "matrices"] += count * min(ms[1:])
    return found


def compare_variants(vae, way: str, given, repeat: int) -> None:  # noqa: ANN001
    """Print what each variant takes on the device, recorded, one after the other; the first again at the end."""
    for choices in (*VARIANTS[way], {}):
        work = on_device(vae, way, given, choices)
        for lasting in (True, False) if not choices else (True,):
            vae.engine.graphs.clear()
            name = f"{choices or 'as it is'}{'' if lasting else ', not recorded'}"
            try:
                ms = [timed(lambda: work(lasting)) for _ in range(repeat + 3)][3:]  # noqa: B023
            except RuntimeError as error:
                print(f"  {way} on the device, {name:38} {str(error)[:90]}")
            else:
                print(f"  {way} on the device, {name:38} {statistics.median(ms):8.3f} ms, {min(ms):.3f} to {max(ms):.3f}")  # fmt: skip
    vae.engine.graphs.clear()


def profile(vae, way: str, given, lines: int) -> None:  # noqa: ANN001
    """Print the kernels of one run."""
    import torch

    work = on_device(vae, way, given, {})
    work(lasting=False)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        work(lasting=False)
        wait()
    if not torch.cuda.is_available():
        print(found.key_averages().table("self_cpu_time_total", row_limit=lines))
        return
    kernels = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    print(f"  {way}: {total / 1e3:.3f} ms in {sum(e.count for e in kernels)} kernels")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:lines]:
        print(f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:4} x {e.key[:110]}")


def case(vae, exact, name: str, args: argparse.Namespace) -> dict:  # noqa: ANN001
    """Measure and print one case; its row of the record."""
    import torch

    from ark.benchmarks.record import row

    way, batch, size = CASES[name]
    size = size // 16 if args.tiny else size
    given = input_for(way, batch, size)
    found = measure(vae, way, given, args.repeat)
    medians = {who: statistics.median(ms) for who, ms in found.items()}
    off, lowest, memory = errors(vae, exact, way, given), floor(vae, way, given), peaks(vae, way, given)  # fmt: skip
    least = sum(lowest.values())
    torch.cuda.empty_cache()
    note = f"error against fp32 {off['Ark']:.4f}, ComfyUI's {off['ComfyUI']:.4f}"
    if memory:
        note += f"; at most {memory['Ark']:.2f} GB, ComfyUI {memory['ComfyUI']:.2f} GB"
    print(f"{name:26} Ark {medians['Ark']:8.2f} ms ({min(found['Ark']):.2f} to {max(found['Ark']):.2f}), ComfyUI {medians['ComfyUI']:8.2f} ms, "
          f"floor {least:7.2f} ms ({lowest['convolutions']:.2f} + {lowest['matrices']:.2f}); {note}", flush=True)  # fmt: skip
    return row(name, medians["Ark"], "ms", args.repeat, {"ComfyUI": medians["ComfyUI"]}, least, note)  # fmt: skip


def main() -> None:
    args = arguments()
    host = import_host(args.comfyui)
    import torch

    from ark.benchmarks.models import model_folder
    from ark.benchmarks.record import write_record

    with model_folder(args.folder) as folder, torch.inference_mode():
        vae, exact = load(folder, args.tiny)
        rows = [case(vae, exact, name, args) for name in CASES]
        for way in ("decode", "encode"):
            given = input_for(way, 1, 64 if args.tiny else 1024)
            compare_variants(vae, way, given, args.repeat)
            profile(vae, way, given, args.profile)
        engine = vae.engine
        print(f"recorded: {engine.graphs.recorded} ({engine.graphs.why_not}); ComfyUI ran because: {sorted(engine.reasons)}")  # fmt: skip
    if not args.tiny:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "comfyui": host}  # fmt: skip
        print(write_record("vae", torch.cuda.get_device_name(), versions, rows))


if __name__ == "__main__":
    main()
