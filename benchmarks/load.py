"""From a safetensors file to tensors on the device: `python benchmarks/load.py [--folder DIR] [--repeat 7]`.

Ark's igniter and its peers load the same file of Klein's true shapes with random bf16 weights, interleaved, each in turn
(A B B A); nothing is pinned before, except in `reload`. Floors from the same run: copies from pinned memory (warm), raw
O_DIRECT reads (cold). Last, how much anonymous memory each path of Ark's and each peer takes while it loads. Needs a GPU, 30 GB of
disk and the pack importable as `ark`; `--tiny` runs every step at small size, on a CPU too, to test the benchmark itself
(then nothing is recorded).
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file

from ark.benchmarks.models import (
    model_folder,
    text_encoder_shapes,
    transformer_shapes,
    write_random,
)
from ark.benchmarks.record import bar_chart, row, write_record
from ark.toolkit.disk import read_speed
from ark.toolkit.header import read_header
from ark.toolkit.layout import plan_layout
from ark.toolkit.paths import PATHS, TransferPath, mmap_pin, pump
from ark.toolkit.rates import link_rate
from ark.toolkit.storage import probe_storage
from ark.toolkit.transfer import transfer


def drop_from_cache(path: Path) -> None:
    """Make the next read come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def unpin() -> None:
    """Let nothing of an earlier load be pinned."""
    for identity in list(mmap_pin._pinned):
        mmap_pin.forget(identity)


def ark_load(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Header, layout, transfer, views: what the patcher does when nobody else uses the device."""
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
    try:
        from instanttensor import safe_open

        def instant(path: Path, device: torch.device) -> dict:
            with safe_open([str(path)], framework="pt", device=device.index or 0) as source:
                return dict(source.tensors())

        found["instanttensor"] = instant
    except ImportError:
        print("instanttensor is not installed")
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
    parser.add_argument(
        "--folder", type=Path, help="where the files are made and kept (default: temporary)"
    )
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cold-repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("this needs a GPU; --tiny tests the script itself")
    with model_folder(args.folder) as folder:
        small = dict(hidden=256, double=1, single=2, context=192) if args.tiny else {}
        transformer = write_random(
            folder / "flux-2-klein-4b.safetensors", transformer_shapes(**small)
        )
        small = dict(hidden=64, mlp=64, heads=1, kv=1, vocab=999) if args.tiny else {}
        text = write_random(
            folder / "qwen_3_4b_27_layers.safetensors", text_encoder_shapes(**small, layers=27)
        )
        check(transformer, device)
        rows = measure(transformer, text, device, args)
    if args.tiny:
        return
    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "safetensors",
        "runai-model-streamer",
        "fastsafetensors",
        "instanttensor",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device)
    print(write_record("load", name, versions, rows))
    print(bar_chart("load", f"Seconds from file to tensors on the device ({name}), shorter is better", [item for item in rows if item["unit"] == "s"]))  # fmt: skip


def measure(transformer: Path, text: Path, device: torch.device, args: argparse.Namespace) -> list[dict]:  # fmt: skip
    """The cases of time, then those of memory."""
    loaders = {"ark": ark_load, **peers()}
    size, both = transformer.stat().st_size, transformer.stat().st_size + text.stat().st_size
    link = link_rate(device)
    rows = []

    def cold() -> None:
        unpin()
        drop_from_cache(transformer)

    def case(name: str, files: list[Path], repeat: int, floor: float | None, before=unpin, only=loaders) -> None:  # fmt: skip
        print(name)
        works = {k: (lambda load=loaders[k]: [load(file, device) for file in files]) for k in only}
        for work in works.values() if before is not cold else ():
            before()
            work()
        found = interleaved(works, repeat, device, before)
        rows.append(row(name, found.pop("ark"), "s", repeat, found, floor))
        print(rows[-1], flush=True)

    case("transformer_warm", [transformer], args.repeat, link and size / link)
    quick = [name for name in loaders if name in ("ark", "safetensors", "runai")]
    case("all_warm", [text, transformer], args.repeat, link and both / link, only=quick)
    case("reload", [text, transformer], args.repeat, link and both / link, lambda: None, ("ark",))
    raw = []
    for _ in range(args.cold_repeat):
        drop_from_cache(transformer)
        raw.append(size / read_speed(transformer, size, float("inf")).rate)
    print("raw O_DIRECT", *(f"{seconds:.3f}" for seconds in raw), flush=True)
    case("transformer_cold", [transformer], args.cold_repeat, statistics.median(raw), cold)
    rows += memory(transformer, device, loaders, cold)
    return rows


def memory(transformer: Path, device: torch.device, loaders: dict, cold: Callable) -> list[dict]:  # fmt: skip
    """Anonymous memory that each of Ark's paths and each peer takes while it loads, its pinned ring included."""
    file = read_header(transformer)
    layout = plan_layout(file.entries)

    def by(path: TransferPath) -> None:
        target = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        path.copy(file, layout, target, probe_storage(file), lambda nbytes: None)

    def peak(work: Callable[[], object], before: Callable[[], None]) -> float:
        before()
        while pump._ring:
            pump.unregister(pump._ring.pop().data_ptr())
        return peak_anonymous(work)

    found = {
        name: peak(lambda load=load: load(transformer, device), unpin)
        for name, load in loaders.items()
        if name != "ark"
    }
    rows = []
    for state, before in {"warm": unpin, "cold": cold}.items():
        for name, path in PATHS.items():
            before()
            if path.unavailable(file, device, probe_storage(file)) is None:
                held = peak(lambda path=path: by(path), before)
                rows.append(row(f"memory_{name}_{state}", held, "GB", 1, found))
                print(rows[-1], flush=True)
    return rows


def peak_anonymous(work: Callable[[], object]) -> float:
    """How many GB of anonymous memory the process holds at most while `work` runs, over what it held before."""

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(re.search(rf"{kind}:\s+(\d+)", status)[1]) for kind in ("RssAnon", "RssShmem"))  # fmt: skip

    gc.collect()
    before, values, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            values.append(held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(values) * 1024 / 1e9


if __name__ == "__main__":
    main()
