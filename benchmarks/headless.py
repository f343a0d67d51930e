"""The trigger script against diffusers: `python benchmarks/headless.py [--folder DIR] [--tokenizer DIR] [--repeat 10]`.

A diffusers folder of Klein 4B's true shapes with random weights, read by both sides, the files warm, 1024x1024, 4 steps.

cold_process: from starting `ignite_ark_4b.py` to the whole image file, imports and all, against a script that calls
`from_pretrained(...).to("cuda")` and the pipeline; the split is in the note.
load_all: `load_pipeline` against `from_pretrained(...).to("cuda")`, each in a fresh process in which both libraries are
imported and the GPU is awake.
new_prompt_bf16, new_prompt_fp8, and with fp8 attention, where that runs: from a prompt that was never encoded to the picture
in memory, everything loaded and warm, against diffusers as it is, and against diffusers with compiled blocks and cuDNN's
attention; one process, in turns. Install accelerate, without which diffusers loads slowly.

The processes may keep their libraries' modules compiled, as everywhere but in some containers; a first turn does it.

Needs a GPU, 80 GB of its memory, 17 GB of disk, and a tokenizer (`--tokenizer`, or where the script finds one). `--tiny` runs
it with small random files, on a CPU too, to test the benchmark itself (then nothing is recorded).
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
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ark.benchmarks.models import (
    by_name,
    model_folder,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
    write_random,
)
from ark.benchmarks.record import bar_chart, row, write_record

SCRIPT = Path(__file__).resolve().parent.parent / "ignite_ark_4b.py"
PROMPT = "a red fox in the snow, number {}"
STEPS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where the files are made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="a folder with Qwen3's vocabulary")
    parser.add_argument("--repeat", type=int, default=10, help="turns of each prompt; a third of it of each process")  # fmt: skip
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", choices=("load_ark", "load_diffusers", "diffusers"), help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_pipeline(folder: Path, tokenizer: Path | None, tiny: bool) -> Path:
    """A folder as diffusers saves it, of random weights."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ark.patches.tokenizer import load_tokenizer
    from ark.toolkit.diffusers_keys import transformer_to_diffusers, vae_to_diffusers
    from ark.toolkit.model_files import find_model

    hidden, layers, width = (64, 28, 32) if tiny else (2560, 36, 128)
    heads, blocks = (2, (1, 2)) if tiny else (24, (5, 20))
    mlp, qwen_heads = (128, (1, 1)) if tiny else (9728, (32, 8))
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=qwen_heads[0], num_key_value_heads=qwen_heads[1], tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads,
            joint_attention_dim=3 * hidden, guidance_embeds=False,
        )  # fmt: skip
        vae = AutoencoderKLFlux2(block_out_channels=tuple(width * m for m in (1, 2, 4, 4)))
        text_encoder = Qwen3ForCausalLM(config)
    vocabulary = load_tokenizer(tokenizer or find_model([]).tokenizer)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(scheduler, vae, text_encoder, vocabulary, transformer, is_distilled=True)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(folder)
    for part in ("scheduler", "tokenizer"):
        getattr(pipeline, part).save_pretrained(folder / part)
    _name_added_tokens(folder / "tokenizer")
    for part in ("transformer", "vae"):
        getattr(pipeline, part).save_config(folder / part)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder / "text_encoder")

    def renamed(shapes: dict, rename: Callable[[dict], dict] = dict) -> dict[str, tuple[int, ...]]:
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in rename(tensors).items()}

    weights = "diffusion_pytorch_model.safetensors"
    shapes = transformer_shapes(128 * heads, *blocks, 3 * hidden)
    write_random(folder / "transformer" / weights, renamed(shapes, transformer_to_diffusers))
    shapes = text_encoder_shapes(hidden, mlp, layers, *qwen_heads)
    write_random(folder / "text_encoder" / "model.safetensors", renamed(shapes))
    write_random(folder / "vae" / weights, renamed(vae_shapes(width), vae_to_diffusers), torch.float32)  # fmt: skip
    return folder


def _name_added_tokens(folder: Path) -> None:
    """As in Klein's own settings: where they are not named, transformers reads the whole vocabulary once more for them."""
    vocabulary, path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    added = {str(token.pop("id")): token for token in json.loads(vocabulary.read_text("utf-8"))["added_tokens"]}  # fmt: skip
    settings = {**json.loads(path.read_text("utf-8")), "added_tokens_decoder": added}
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def warm(folder: Path) -> None:
    """Bring the files into the page cache."""
    for path in folder.rglob("*.safetensors"):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def device_and_size(args: argparse.Namespace) -> tuple[str, int]:
    return ("cpu", 64) if args.tiny else ("cuda", 1024)


def own_pipeline(args: argparse.Namespace):  # noqa: ANN201
    """Diffusers' own way."""
    import torch
    from diffusers import Flux2KleinPipeline

    dtype = torch.float32 if args.tiny else torch.bfloat16
    pipeline = Flux2KleinPipeline.from_pretrained(args.folder, torch_dtype=dtype, local_files_only=True)  # fmt: skip
    pipeline.to(device_and_size(args)[0])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def own_image(pipeline, prompt: str, size: int, seed: int):  # noqa: ANN001, ANN201
    import torch

    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt=prompt, width=size, height=size, num_inference_steps=STEPS, guidance_scale=1.0, generator=generator).images[0]  # fmt: skip


def child(args: argparse.Namespace) -> None:
    """What one fresh process does; prints seconds as JSON."""
    device, size = device_and_size(args)
    if args.child == "diffusers":
        own_image(own_pipeline(args), PROMPT.format(0), size, 0).save(args.out, compress_level=1)
        print("{}")
        return
    import torch
    from diffusers import Flux2KleinPipeline  # noqa: F401
    from transformers import Qwen3ForCausalLM, Qwen3Model  # noqa: F401

    from ark.patches.pipeline import load_pipeline

    torch.zeros(1, device=device)
    start = time.perf_counter()
    if args.child == "load_ark":
        loaded: object = load_pipeline(args.folder, device)
    else:
        loaded = own_pipeline(args)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start  # without what it takes to give it all up again
    del loaded
    print(json.dumps({"seconds": seconds}))


def run_process(args: argparse.Namespace, *command: str | Path, out: Path | None = None) -> tuple[float, dict]:  # fmt: skip
    """Seconds until a process ended, or until the file that it writes was there, and the JSON that it printed."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, env=environ)  # fmt: skip
    seconds = None
    while out is not None and seconds is None and process.poll() is None:
        if out.exists():
            seconds = time.perf_counter() - start
        time.sleep(0.002)
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}: {printed}")
    return seconds or time.perf_counter() - start, json.loads(printed.splitlines()[-1])


def cold_process(args: argparse.Namespace, scratch: Path, turns: int) -> dict:
    """Start to image file."""
    device, size = device_and_size(args)
    times: dict[str, list[float]] = {"ark": [], "diffusers_eager": []}
    splits: list[dict] = []
    for turn in range(
        -1, turns
    ):  # the first turn warms the files of the libraries, and Ark's notes
        for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
            out = scratch / f"{name}{turn}.png"
            if name == "ark":
                command = [SCRIPT, PROMPT.format(0), "--model", args.folder, "--device", device]
                command += ["--size", f"{size}x{size}", "--precision", "fp8", "--json", "--out", out]  # fmt: skip
            else:
                command = [__file__, "--child", "diffusers", "--folder", args.folder, "--out", out]
                command += ["--tiny"] if args.tiny else []
            seconds, printed = run_process(args, *command, out=out)
            print(f"  cold {name} {seconds:.3f}", flush=True)
            if turn >= 0:
                times[name].append(1e3 * seconds)
                splits += [printed] if name == "ark" else []
    best = splits[times["ark"].index(sorted(times["ark"])[len(splits) // 2])]
    load, image = best["load"], best["images"][0]["seconds"]
    parts = {"torch and checks": load["before"], "load": load["seconds"], "of it importing": load["importing"], "of it waiting": load["waiting"], **image}  # fmt: skip
    note = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    return _row("cold_process", times, f"fp8; {note}; {'; '.join(load['transfers'])}")


def load_all(args: argparse.Namespace, turns: int) -> dict:
    """All weights onto the device, from fresh processes."""
    times: dict[str, list[float]] = {"ark": [], "diffusers_eager": []}
    for turn in range(turns):
        for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
            which = "load_ark" if name == "ark" else "load_diffusers"
            command = [__file__, "--child", which, "--folder", args.folder, *(["--tiny"] if args.tiny else [])]  # fmt: skip
            found = run_process(args, *command)[1]["seconds"]
            print(f"  load {name} {found:.3f}", flush=True)
            times[name].append(1e3 * found)
    return _row("load_all", times, "Ark leaves the text encoder's layers 28 to 36 out")


def new_prompts(args: argparse.Namespace, turns: int) -> list[dict]:
    """A prompt that was never encoded to the picture, in turns."""
    from ark.patches.diffusers import ignite
    from ark.patches.pipeline import load_pipeline
    from ark.patches.render import Renderer
    from ark.toolkit.jobs import Job

    device, size = device_and_size(args)
    settings = {"bf16": ("bf16", "auto"), "fp8": ("fp8", "auto"), **by_name(device)}
    splits: dict[str, list[dict[str, float]]] = {f"ark_{name}": [] for name in settings}
    makers: dict[str, Callable[[str, int], object]] = {}

    def ark(name: str, precision: str, attention: str) -> Callable[[str, int], object]:
        pipeline, _ = load_pipeline(args.folder, device)
        pipeline.set_progress_bar_config(disable=True)
        combustion = ignite(pipeline, attention, engine="fused", precision=precision)
        renderer = Renderer(pipeline)
        print(combustion.report)

        def make(prompt: str, seed: int) -> object:
            made = renderer(Job(prompt, seed, size, size, STEPS), combustion.run)
            splits[name].append(made.seconds)
            return made.image

        return make

    def own(pipeline) -> Callable[[str, int], object]:  # noqa: ANN001
        return lambda prompt, seed: own_image(pipeline, prompt, size, seed)

    makers |= {f"ark_{name}": ark(f"ark_{name}", *how) for name, how in settings.items()}
    makers["diffusers_eager"] = own(own_pipeline(args))
    regional = own_pipeline(args)
    if not args.tiny:
        regional.transformer.set_attention_backend("_native_cudnn")
    regional.transformer.compile_repeated_blocks(**({"backend": "eager"} if args.tiny else {"fullgraph": True}))  # fmt: skip
    makers["diffusers_regional"] = own(regional)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(-3, turns):
        for name in list(makers)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            makers[name](
                PROMPT.format(turn), turn + 3
            )  # the picture is in memory: nothing is left to wait for
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for case in settings:
        name = f"ark_{case}"
        peers = {p: times[p] for p in ("diffusers_eager", "diffusers_regional")}
        stages = {s: 1e3 * statistics.median(x[s] for x in splits[name][3:]) for s in splits[name][0]}  # fmt: skip
        note = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in stages.items())
        rows.append(_row(f"new_prompt_{case}", {"ark": times[name], **peers}, note))
    return rows


def _row(case: str, times: dict[str, list[float]], note: str) -> dict:
    median = {name: statistics.median(values) for name, values in times.items()}
    found = row(case, median.pop("ark"), "ms", len(times["ark"]), median, note=note)
    print(found, flush=True)
    return found


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    import torch

    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("this needs a GPU; --tiny tests the script itself")
    processes = max(1, args.repeat // 3)
    with model_folder(args.folder) as kept, tempfile.TemporaryDirectory() as scratch:
        args.folder = write_pipeline(kept / ("klein-tiny" if args.tiny else "klein-4b"), args.tokenizer, args.tiny)  # fmt: skip
        warm(args.folder)
        rows = [cold_process(args, Path(scratch), processes), load_all(args, processes)]
        rows += new_prompts(args, args.repeat)
    if args.tiny:
        return
    packages = [n for n in ("torch", "diffusers", "transformers", "accelerate") if find_spec(n)]
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    card = torch.cuda.get_device_name()
    print(write_record("headless", card, versions, rows))
    print(bar_chart("headless", f"Headless, Klein 4B, ms ({card}), shorter is better", rows))


if __name__ == "__main__":
    main()
