"""From Queue to the decoded picture: `python benchmarks/end_to_end.py --comfyui DIR [--folder DIR] [--repeat 15]`.

Real ComfyUI servers side by side, real HTTP and websockets, 1024x1024, 4 steps, everything loaded: Ark's nodes (fused
engine, bf16, fp8, and with the kernels that run by name only, where they are installed) against stock ones in both of the
host's memory modes, in turns; one of them works at a time. A prompt is queued a while after the last picture, as by somebody
who has looked at it, and others as soon as that is there (`_at_once`): a card that had no pause is held back by its power
limit. A case ends when the server starts the node after VAEDecode, so that the picture is in the host's memory; what SaveImage
takes is measured apart. Then an editing reference is encoded, and 200 prompts are queued at once: pictures a second, how busy the
GPU is, and what memory the server holds at the beginning and at the end. Random weights of the true shapes. Needs a GPU, a
ComfyUI of 0.33 or later and 17 GB of disk. `--tiny` runs Ark's part with the embedded model, on a CPU too, to test the
benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import re
import statistics
import subprocess
import threading
import time
import urllib.parse
from importlib.metadata import version
from pathlib import Path

import torch

from ark import bootstrap
from ark.benchmarks import first_image
from ark.benchmarks.first_image import EMBEDDED, FILES, STATIC, node
from ark.benchmarks.models import (
    BY_NAME,
    by_name,
    model_folder,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
    write_random,
)
from ark.benchmarks.record import bar_chart, row, write_record
from ark.toolkit.fused.runner import PRECISIONS
from ark.toolkit.matrices import choose_algorithms, usual_shapes

ARK = {
    "bf16": {"attention": "auto", "precision": "bf16"},
    "fp8": {"attention": "auto", "precision": "fp8"},
    **{
        case: {"attention": attention, "precision": precision}
        for case, (precision, attention) in BY_NAME.items()
    },
}  # a server for each: in one, the weights would leave for each other in turns
SERVERS = {**dict.fromkeys(ARK, ()), "comfyui_static": STATIC, "comfyui_dynamic": ()}
FLAGS = ["--preview-method", "none"]  # the host's own default; a preview makes every step wait
HIDDEN = 3072  # width of Klein 4B
WARM = 4  # rounds that load, time kernels and record
REST = 0.5  # s; on an H200 prompts of one server took as long after 0.3, 1, 3 and 10
AT_ONCE = "_at_once"  # the end of a case's name
LEFT = {  # rows of what Ark has begun before the node is asked for it, by the node
    "encode_new": ("text", "Ark's: what is left of it at its node; it begins when the prompt arrives"),
    "decode": ("decode", "Ark's: what is left of it at its node; it begins when the sampler has ended, where most of it is counted"),
}  # fmt: skip
NEW_HERE = 25.0  # s after the first of them, in which Ark finds out whether it may record
Graph = dict[str, dict]


class Server:
    """A running host with one websocket kept open, as the canvas has."""

    def __init__(self, name: str, host: bootstrap.Host, args: argparse.Namespace):
        self.name, self.host, self.client = name, host, bootstrap.Client(host.url)
        self.files, self.size = (EMBEDDED, 256) if args.tiny else (FILES, 1024)
        self.client.object_info()
        place = urllib.parse.urlsplit(host.url)
        self.stream = bootstrap.WebSocket(place.hostname, place.port, f"/ws?clientId={self.client.id}")  # fmt: skip

    def graph(self, prompt: str, seed: int, end: str = "PreviewAny") -> Graph:
        """Loader, prompt, four steps, decode, and a node that takes the picture."""
        if self.name not in ARK:
            found = first_image.graph("comfyui", self.files, self.size, prompt, seed)
            found.pop("show")
        else:
            found = {
                "ark": node("ArkFastLoader", **self.files),
                "text": node("CLIPTextEncode", clip=["ark", 1], text=prompt),
                "latent": node("EmptyFlux2LatentImage", width=self.size, height=self.size, batch_size=1),
                "burn": node("ArkSageCombustion", model=["ark", 0], engine="fused", **ARK[self.name]),
                "sample": node("ArkSampler4Step", model=["burn", 0], positive=["text", 0], latent_image=["latent", 0], seed=seed, steps=4, denoise=1.0),
                "decode": node("VAEDecode", samples=["sample", 0], vae=["ark", 2]),
            }  # fmt: skip
        source = {"source": ["decode", 0]}
        if end == "SaveImage":
            source = {"images": ["decode", 0], "filename_prefix": "ark"}
        return found | {"show": node(end, **source)}

    def edit(self, colour: int) -> Graph:
        """Encode a reference of one colour; what is in a picture does not change what it takes."""
        found = self.graph("make it night", 0)
        image = {
            "picture": node(
                "EmptyImage", width=self.size, height=self.size, batch_size=1, color=colour
            )
        }
        if self.name in ARK:
            encode = {"encode": node("ArkReferenceImages", conditioning=["text", 0], vae=["ark", 2], image1=["picture", 0])}  # fmt: skip
            return {name: found[name] for name in ("ark", "text")} | image | encode | {"show": node("PreviewAny", source=["encode", 1])}  # fmt: skip
        encode = {"encode": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0])}
        return {"vae": found["vae"]} | image | encode | {"show": node("PreviewAny", source=["encode", 0])}  # fmt: skip

    def run(self, graph: Graph) -> tuple[float, dict[str, float]]:
        """Milliseconds from Queue until the last node starts, and those of each node."""
        ends: list[float] = []

        def watch(kind: str, data: dict) -> None:
            if kind == "executing" and data.get("node") == "show":
                ends.append(time.perf_counter())

        start = time.perf_counter()
        result: dict = {"status": "success", "events": [], "previews": 0, "node_seconds": {}}
        result["prompt_id"] = self.client.prompt(graph)
        error = bootstrap.follow(self.stream, result, watch, time.monotonic() + 300)
        if error:
            raise SystemExit(f"{self.name}: {error['exception_message']}\n{self.host.log_tail()}")
        return 1e3 * (ends[0] - start), {k: 1e3 * v for k, v in result["node_seconds"].items()}

    def memory(self) -> tuple[float, float]:
        """GB of anonymous memory that the process holds, and GB of the GPU that are taken, by everything on it."""
        status = Path(f"/proc/{self.host.process.pid}/status").read_text()
        anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024 / 1e9
        device = self.client.get("/system_stats")["devices"][0]
        return anonymous, (device["vram_total"] - device["vram_free"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the files are made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--rest", type=float, default=REST, help="s between a picture and the next prompt")  # fmt: skip
    parser.add_argument("--sustained", type=int, default=200, help="prompts queued at once")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny tests the script itself")
    with model_folder(args.folder) as folder, contextlib.ExitStack() as stack:
        if not args.tiny:
            write_random(folder / FILES["diffusion_model"], transformer_shapes())
            write_random(folder / FILES["text_encoder"], text_encoder_shapes())
            write_random(folder / FILES["vae"], vae_shapes(), torch.float32)
            # as each server would that idles, but they would do it at once
            for precision in PRECISIONS:
                choose_algorithms(torch.device("cuda", 0), usual_shapes(HIDDEN), precision)
        kinds = ("diffusion_models", "text_encoders", "vae")
        folders = {} if args.tiny else {kind: [folder] for kind in kinds}
        servers = {}
        for name, flags in SERVERS.items():
            usual = name in ("bf16", "fp8")
            if not usual and (args.tiny or (name in BY_NAME and name not in by_name("cuda"))):
                continue
            host = stack.enter_context(bootstrap.Host.start(args.comfyui, extra_args=[*FLAGS, *flags], model_folders=folders))  # fmt: skip
            servers[name] = Server(name, host, args)
        rows = measure(servers, args.repeat, args.rest) + edits(servers, args.repeat)
        rows += [
            saving(servers["bf16"]),
            sustained(servers.get("fp8_attention", servers["fp8"]), args.sustained),
        ]
    if args.tiny:
        return
    known = (args.comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]
    versions = {"python": platform.python_version(), "torch": version("torch"), "comfyui": known}
    card = torch.cuda.get_device_name()
    print(write_record("end_to_end", card, versions, rows))
    timed = [
        item
        for item in rows
        if item["unit"] == "ms" and item["case"] not in LEFT and AT_ONCE not in item["case"]
    ]
    print(bar_chart("end_to_end", f"Klein 4B, Queue to picture, ms ({card}), shorter is better", timed))  # fmt: skip


def said(*given: object, **named: object) -> dict:
    """A row, printed."""
    found = row(*given, **named)
    print(found, flush=True)
    return found


def median(runs: list[tuple[float, dict[str, float]]], of: str | None = None) -> float:
    return statistics.median(total if of is None else spent.get(of, 0.0) for total, spent in runs)


def measure(servers: dict[str, Server], repeat: int, rest: float) -> list[dict]:
    """New and repeated prompts, after a rest (s) and at once, in turns."""
    cases = [(case, end) for end in ("", AT_ONCE) for case in ("new_prompt", "repeat_prompt")]
    found: dict[str, dict[str, list]] = {case + end: {name: [] for name in servers} for case, end in cases}  # fmt: skip
    numbers = itertools.count(50)
    for turn in range(-WARM, repeat):
        for name, server in list(servers.items())[:: 1 if turn % 2 == 0 else -1]:
            prompt, took = "", []
            for case, end in cases if turn >= 0 else cases[:2]:
                seed = next(numbers)
                if case == "new_prompt":
                    prompt = f"picture {seed} of {name} " + "word " * 40
                if turn >= 0 and not end:
                    time.sleep(rest)
                took.append(server.run(server.graph(prompt, seed)))
                if turn >= 0:
                    found[case + end][name].append(took[-1])
            if turn == -WARM:
                print(f"{name}: first {took[0][0]:.0f} ms, second {took[1][0]:.0f} ms", flush=True)
        if turn == -WARM and torch.cuda.is_available():
            time.sleep(NEW_HERE)
    rows, stock = [], [name for name in servers if name not in ARK]
    for case, end in cases:
        of = found[case + end]
        peers = {name: median(of[name]) for name in stock}
        for name in filter(servers.__contains__, ARK):
            parts = ", ".join(f"{part} {median(of[name], part):.1f}" for part in ("text", "sample", "decode"))  # fmt: skip
            pause = f"{rest:g} s after the last picture" if not end else "at once after it"
            rows.append(said(f"{case}_{name}{end}", median(of[name]), "ms", repeat, peers, note=f"{pause}; {parts}"))  # fmt: skip
    new = found["new_prompt"]
    for case, (part, note) in LEFT.items():
        peers = {name: median(new[name], part) for name in stock}
        rows.append(said(case, median(new["bf16"], part), "ms", repeat, peers, note=note))
    return rows


def edits(servers: dict[str, Server], repeat: int) -> list[dict]:
    """The node that encodes a reference, each time another one."""
    found: dict[str, list] = {name: [] for name in servers}
    for turn in range(-2, repeat):
        for name, server in list(servers.items())[:: 1 if turn % 2 == 0 else -1]:
            run = server.run(server.edit(1000 + turn))
            if turn >= 0:
                found[name].append(run)
    peers = {name: median(runs, "encode") for name, runs in found.items() if name not in ARK}
    return [said("encode_reference", median(found["bf16"], "encode"), "ms", repeat, peers)]


def saving(server: Server) -> dict:
    """What SaveImage takes on top, of pictures of noise, which PNG cannot make small."""
    runs = [server.run(server.graph("saved", 900 + number, end="SaveImage")) for number in range(5)]
    note = "on top of the above; the picture of random weights is noise, which PNG is slow with"
    return said("save_image", median(runs, "show"), "ms", len(runs), note=note)


def sustained(server: Server, count: int) -> dict:
    """Prompts queued at once, each a new one."""
    for number in range(3):
        server.run(server.graph(f"before {number}", number))
    memory, done = [server.memory()], threading.Event()
    busy: list[float] = []

    def watch() -> None:
        ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while torch.cuda.is_available() and not done.wait(0.25):
            busy.append(float(subprocess.run(ask, capture_output=True, text=True).stdout))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, last = time.perf_counter(), ""
    for number in range(count):
        last = server.client.prompt(server.graph(f"sustained {number}", number))
    result: dict = {"prompt_id": last, "events": [], "previews": 0, "node_seconds": {}}
    bootstrap.follow(server.stream, result, None, time.monotonic() + 600)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    memory.append(server.memory())
    note = f"{server.name}, {count} new prompts queued at once, {1e3 * seconds / count:.1f} ms each; GPU busy {statistics.fmean(busy or [0]):.0f} %; "  # fmt: skip
    note += "; ".join(f"{kind} {before:.2f} GB before, {after:.2f} after" for kind, before, after in zip(("anonymous memory", "GPU memory, of all servers"), *memory, strict=True))  # fmt: skip
    return said(f"sustained_{count}", count / seconds, "images/s", count, note=note)


if __name__ == "__main__":
    main()
