"""From a safetensors file to tensors on the device: `python benchmarks/load.py [--folder DIR] [--repeat 7]`.

Ark's igniter and its peers load the same file of Klein's true shapes with random bf16 weights, interleaved, each in turn
(A B B A). Floors from the same run: copies from pinned memory (warm), raw O_DIRECT reads (cold). Needs a GPU, 30 GB of
disk and the pack importable as `ark`; `--tiny` runs every step at small size, on a CPU too, to test the benchmark itself
(then nothing is recorded).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file

from ark.benchmarks.models import text_encoder_shapes, transformer_shapes, write_random
from ark.benchmarks.record import bar_chart, row, write_record
from ark.toolkit.header import read_header
from ark.toolkit.layout import plan_layout
from ark.toolkit.rates import link_rate
from ark.toolkit.transfer import transfer


def drop_from_cache(path: Path) -> None:
    """Make the next read come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(path: Path) -> None:
    """The floor of a cold load: 16 threads, O_DIRECT, 8 MB reads, nothing done with the bytes."""
    import mmap

    size, step, numbers = path.stat().st_size, 8 << 20, itertools.count()

    def work() -> None:
        buffer, descriptor = mmap.mmap(-1, step), os.open(path, os.O_RDONLY | os.O_DIRECT)
        while (offset := next(numbers) * step) < size:
            os.preadv(descriptor, [buffer], offset)
        os.close(descriptor)

    with ThreadPoolExecutor(16) as pool:
        for job in [pool.submit(work) for _ in range(16)]:
            job.result()


def ark_load(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Header, layout, transfer, views: what the patcher does."""
    file = read_header(path)
    layout = plan_layout(file.entries)
    flat, _ = transfer(file, layout, device)
    return layout.views(flat)


def peers() -> dict[str, Callable[[Path, torch.device], object]]:
    """The other loaders that are installed."""
    found: dict[str, Callable] = {"safetensors": lambda p, d: load_file(p, device=str(d))}
    try:
        from runai_model_streamer import SafetensorsStreamer

        def runai(path: Path, device: torch.device) -> dict:
            with SafetensorsStreamer() as streamer:
                streamer.stream_file(str(path))
                return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}

        found["runai"] = runai
    except ImportError:
        print("runai-model-streamer is not installed")
    try:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        def fast(path: Path, device: torch.device) -> dict:
            loader = SafeTensorsFileLoader(SingleGroup(), str(device), nogds=True)
            loader.add_filenames({0: [str(path)]})
            buffers = loader.copy_files_to_device()
            return {name: buffers.get_tensor(name) for name in loader.get_keys()}

        found["fastsafetensors"] = fast
    except ImportError:
        print("fastsafetensors is not installed")
    return found


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until everything that `work` started on the device is done."""
    gc.collect()
    start = time.perf_counter()
    kept = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del kept
    return seconds


def interleaved(works: dict[str, Callable[[], object]], repeat: int, device: torch.device, before=lambda: None) -> dict[str, float]:  # fmt: skip
    """Median seconds of each, in turns: forwards, then backwards."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat):
        for name in list(works)[:: 1 if turn % 2 == 0 else -1]:
            before()
            times[name].append(timed(works[name], device))
    for name, values in times.items():
        print(f"  {name:16} " + " ".join(f"{value:.3f}" for value in values), flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def check(path: Path, device: torch.device) -> None:
    """The bytes on the device are the bytes of the file."""
    expected = load_file(path)
    for name, tensor in ark_load(path, device).items():
        assert torch.equal(tensor.cpu(), expected[name]), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where the files are made (default: temporary)")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cold-repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("this needs a GPU; --tiny tests the script itself")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        small = dict(hidden=256, double=1, single=2, context=192) if args.tiny else {}
        transformer = write_random(Path(folder, "t.safetensors"), transformer_shapes(**small))
        small = dict(hidden=64, mlp=64, heads=1, kv=1, vocab=999) if args.tiny else {}
        text = write_random(Path(folder, "q.safetensors"), text_encoder_shapes(**small, layers=27))
        check(transformer, device)
        rows = measure(transformer, text, device, args)
    for item in rows:
        print(item)
    if args.tiny:
        return
    versions = {"python": platform.python_version()}
    for package in ("torch", "safetensors", "runai-model-streamer", "fastsafetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device)
    print(write_record("load", name, versions, rows))
    print(bar_chart("load", f"Seconds from file to tensors on the device ({name}), shorter is better", rows))  # fmt: skip


def measure(transformer: Path, text: Path, device: torch.device, args: argparse.Namespace) -> list[dict]:  # fmt: skip
    """The four cases."""
    loaders = {"ark": ark_load, **peers()}
    size, both = transformer.stat().st_size, transformer.stat().st_size + text.stat().st_size
    link = link_rate(device)
    rows = []

    def case(name: str, files: list[Path], repeat: int, floor: float | None, before=lambda: None, only=None) -> None:  # fmt: skip
        print(name)
        works = {
            k: (lambda load=load: [load(file, device) for file in files])
            for k, load in loaders.items()
            if only is None or k in only
        }
        for work in works.values():
            work()
        found = interleaved(works, repeat, device, before)
        rows.append(row(name, found.pop("ark"), "s", repeat, found, floor))

    case("transformer_warm", [transformer], args.repeat, link and size / link)
    raw = []
    for _ in range(args.cold_repeat):
        drop_from_cache(transformer)
        raw.append(timed(lambda: raw_read(transformer), device))
    case("transformer_cold", [transformer], args.cold_repeat, statistics.median(raw), lambda: drop_from_cache(transformer))  # fmt: skip
    case("all_warm", [text, transformer], args.repeat, link and both / link)
    case("reload", [text, transformer], args.repeat, link and both / link, only=("ark",))
    return rows


if __name__ == "__main__":
    main()
