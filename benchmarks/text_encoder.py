"""A prompt to conditioning: `python benchmarks/text_encoder.py --comfyui DIR`.

One process with ComfyUI's real CLIP object, Qwen3-4B's true shapes with random weights, bf16: ComfyUI's own layers and
Ark's, in turns, each prompt a new one; then a prompt that is known. From the text to the conditioning where ComfyUI wants
it; the floor is the matrices alone. Needs a GPU and 8 GB of disk; `--tiny` runs it with the embedded model, on a CPU too, to test the benchmark itself
(then nothing is recorded).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

from ark.benchmarks.klein import import_host

WORDS = 40  # of a prompt; all are padded to 512 tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the file is made and kept (default: temporary)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def load(folder: Path, tiny: bool):  # noqa: ANN201
    """The CLIP."""
    from ark.benchmarks.models import text_encoder_shapes, write_random
    from ark.patches.text_encoder import load_text_encoder
    from ark.toolkit.embedded import embedded_text_encoder

    if tiny:
        return load_text_encoder(embedded_text_encoder())[0]
    path = write_random(folder / "qwen_3_4b.safetensors", text_encoder_shapes())
    return load_text_encoder(path)[0]


def measure(clip, repeat: int) -> dict[str, list[float]]:  # noqa: ANN001
    """Milliseconds by who encodes; the first three rounds load kernels and record."""
    from ark.patches.text_encoder import ENCODER
    from ark.toolkit.embeddings import Embeddings

    model, times = getattr(clip.cond_stage_model, ENCODER), {"Ark": [], "ComfyUI": [], "known": []}
    clip.embeddings, engine = Embeddings("benchmark", on_disk=0), model.engine
    for number in range(repeat + 3):
        for name, ms in times.items():
            model.engine = None if name == "ComfyUI" else engine
            text = f"{name if name != 'known' else 'Ark'} {number} " + "word " * WORDS
            start = time.perf_counter()
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
            ms.append((time.perf_counter() - start) * 1e3)
            assert (clip.source == "memory") == (name == "known")
    model.engine = engine
    return {name: ms[3:] for name, ms in times.items()}


def floor(clip) -> float | None:  # noqa: ANN001
    """Milliseconds of the matrices alone, each by the library at its exact shape; None if the host runs them."""
    import torch

    from ark.toolkit.fused.matrix import Joined

    model = clip.cond_stage_model.qwen3_4b
    layers = model.engine.layers(model.transformer.model)
    if layers is None:
        return None
    joined = [matrix for layer in layers for matrix in (layer.qv, layer.gate_up)]
    matrices = [matrix for layer in layers for matrix in (layer.k, layer.o, layer.down)]
    for matrix in joined:
        matrices += matrix.parts if isinstance(matrix, Joined) else (matrix.weight,)
    inputs = {
        m.shape[1]: torch.randn(512, m.shape[1], dtype=m.dtype, device=m.device) for m in matrices
    }
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for matrix in matrices:
            torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def main() -> None:
    args = arguments()
    host = import_host(args.comfyui)
    import torch

    from ark.benchmarks.record import row, write_record

    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        clip = load(args.folder or Path(temporary), args.tiny)
        found = measure(clip, args.repeat)
        lowest = floor(clip)
        engine = clip.cond_stage_model.qwen3_4b.engine
        print(f"recorded: {engine.graphs.recorded} ({engine.graphs.why_not}); ComfyUI ran because: {sorted(engine.reasons)}")  # fmt: skip
    medians = {name: statistics.median(ms) for name, ms in found.items()}
    rows = [
        row("a new prompt", medians["Ark"], "ms", args.repeat, {"ComfyUI": medians["ComfyUI"]}, lowest),
        row("a known prompt", medians["known"], "ms", args.repeat, {"ComfyUI": medians["ComfyUI"]}),
    ]  # fmt: skip
    for name, ms in found.items():
        print(f"{name:8} median {medians[name]:8.2f} ms, {min(ms):.2f} to {max(ms):.2f}")
    if not args.tiny:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "comfyui": host}  # fmt: skip
        print(write_record("text_encoder", torch.cuda.get_device_name(), versions, rows))


if __name__ == "__main__":
    main()
