"""What each kernel and engine does to pictures: `python benchmarks/kernel_quality.py --comfyui DIR [--captions 200]`.

The embedded model renders the same held-out captions from the same noise with every attention kernel that runs here, with
compiled blocks, and with the fused engine, in one process with ComfyUI's real model objects. The classifier of
`tiny_quality.py` judges the pictures, and the latents are compared with those of the host's own forward in fp32. With
`--pictures DIR` they are made into a folder and not judged, with `--judge DIR` such a folder is judged, on any machine. On a
CPU only torch's math kernel and the fused engine can run, which tests the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import numpy
from PIL import Image

from ark.assets import scenes
from ark.benchmarks.klein import STEPS, import_host
from ark.benchmarks.record import row, write_record

BATCH, SIDE = 20, 16  # pictures at once; latent positions across
REFERENCE = "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--judge", type=Path)
    args = parser.parse_args()
    if not args.judge and not args.comfyui:
        parser.error("--comfyui is needed to make pictures")
    if args.pictures:
        render(args.comfyui, args.captions, args.pictures)
    elif args.judge:
        judge_all(args.judge)
    else:
        with tempfile.TemporaryDirectory() as folder:
            render(args.comfyui, args.captions, Path(folder))
            judge_all(Path(folder))


def judge_all(folder: Path) -> None:
    """Count the captions that each mode drew right."""
    from ark.benchmarks.classifier import judge

    found = json.loads((folder / "found.json").read_text())
    asked = scenes.sample_scenes(found["captions"], 1, held_out=True)

    def share(mode: str) -> float:
        files = sorted((folder / mode).glob("*.webp"))
        right = [all(judge(numpy.asarray(Image.open(file)), scene).values()) for file, (scene, _) in zip(files, asked, strict=True)]  # fmt: skip
        return sum(right) / len(right)

    reference = {REFERENCE: share(REFERENCE)}
    rows = [
        row(mode, share(mode), "share of captions right", found["captions"], reference, note=f"latents: {error:.4f} from those in fp32")
        for mode, error in found["errors"].items()
    ]  # fmt: skip
    for item in rows:
        print(f"{item['case']:16} {item['ark']:7.1%}  {item['note']}")
    if found["gpu"]:
        print(write_record("kernel_quality", found["gpu"], found["versions"], rows))


def render(comfyui: Path, count: int, folder: Path) -> None:
    """Draw every caption in every mode: `folder/<mode>/<number>.webp`, and `folder/found.json`."""
    known = import_host(comfyui)
    import torch

    with torch.inference_mode():
        latents = _draw(count, folder)
    exact = latents.pop(REFERENCE)
    found = {
        "captions": count,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "comfyui": known},
        "errors": {mode: float((x - exact).norm() / exact.norm()) for mode, x in latents.items()},
    }  # fmt: skip
    (folder / "found.json").write_text(json.dumps(found))


def _draw(count: int, folder: Path) -> dict:
    """Pictures to files; the latents [count, 128, SIDE, SIDE] by mode."""
    import torch

    from ark.benchmarks.klein import in_fp32
    from ark.patches.attention import set_attention
    from ark.patches.compile import set_compile
    from ark.patches.fused import set_fused
    from ark.patches.text_encoder import load_text_encoder
    from ark.patches.transformer import load_transformer
    from ark.patches.vae import load_vae
    from ark.toolkit.combustion import unavailable_kernels
    from ark.toolkit.embedded import embedded_folders
    from ark.toolkit.hardware import probe_hardware
    from ark.toolkit.kernels import KERNELS

    folders = embedded_folders()
    clip, _ = load_text_encoder(folders["text_encoders"] / "ark_tiny_qwen3.safetensors")
    model, _ = load_transformer(folders["diffusion_models"] / "ark_tiny_klein.safetensors")
    vae, _ = load_vae(folders["vae"] / "ark_tiny_flux2_vae.safetensors")
    asked = scenes.sample_scenes(count, 1, held_out=True)
    prompts = torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for _, text in asked])
    missing = unavailable_kernels(probe_hardware(model.load_device))
    models = {"comfyui": model}
    models |= {name: set_attention(model, name)[0] for name in KERNELS if name not in missing}
    best, _ = set_attention(model, "auto")
    if torch.cuda.is_available():  # takes minutes on a CPU
        models["compiled"], *_ = set_compile(best, "default")
    models |= {f"fused_{precision}": set_fused(best, precision)[0] for precision in ("bf16", "fp8")}
    found = {}
    for mode in [*models, REFERENCE]:
        mine = models[mode] if mode in models else in_fp32(model)
        found[mode] = torch.cat([sample(mine, part, number) for number, part in enumerate(prompts.split(BATCH))])  # fmt: skip
        (folder / mode).mkdir(parents=True)
        pictures = torch.cat([vae.decode(part).cpu() for part in found[mode].split(BATCH)])
        for number, picture in enumerate(pictures):
            pixels = numpy.asarray(picture * 255 + 0.5).astype("uint8")
            Image.fromarray(pixels).save(
                folder / mode / f"{number:04}.webp", lossless=True, quality=0, method=0
            )
        print(mode, flush=True)
    return found


def sample(model, prompts, seed: int):  # noqa: ANN001, ANN201
    """Latents [len(prompts), 128, SIDE, SIDE] of four steps."""
    import torch

    from ark.patches.sampling import sample_klein

    latent = {"samples": torch.zeros(len(prompts), 128, SIDE, SIDE)}
    positive = [[prompts, {"pooled_output": None}]]
    return sample_klein(model, positive, latent, seed, STEPS, 1.0)["samples"].cpu()


if __name__ == "__main__":
    main()
