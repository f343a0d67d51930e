"""Turn what `train.py` or `train_edits.py` wrote into the files that ship, or back (needs the pack as `ark`).

`python assets/pack.py TRAINED_DIR` packs: the same names, layout and dtype as the files published for ComfyUI; every
dimension stays in the weights. `python assets/pack.py --unpack DIR` writes the files that ship as a training run
leaves them, to go on from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ark.toolkit.diffusers_keys import transformer_to_diffusers, vae_to_diffusers
from ark.toolkit.embedded import ASSETS, COMPACT
from ark.toolkit.keys import transformer_from_diffusers, vae_from_diffusers

TRANSFORMER, VAE = (
    "diffusion_models/ark_tiny_klein.safetensors",
    "vae/ark_tiny_flux2_vae.safetensors",
)


def pack(trained: Path, assets: Path = ASSETS) -> None:
    """From a training run's folder to the three files that ship."""
    transformer = transformer_from_diffusers(load_file(trained / "transformer.safetensors"))
    vae = vae_from_diffusers(load_file(trained / "vae.safetensors"))
    text_encoder = {
        f"model.{k}": v for k, v in load_file(trained / "text_encoder.safetensors").items()
    }
    vocabulary = json.loads((trained / "vocabulary.json").read_text())
    text_encoder["token_ids"] = torch.tensor(vocabulary, dtype=torch.int64)
    for name, state_dict in ((TRANSFORMER, transformer), (VAE, vae), (COMPACT.name, text_encoder)):
        write(state_dict, assets / name)


def unpack(trained: Path, assets: Path = ASSETS) -> None:
    """From the three files that ship to a training run's folder."""
    text_encoder = load_file(assets / COMPACT.name)
    vocabulary = text_encoder.pop("token_ids").tolist()
    text_encoder = {k.removeprefix("model."): v for k, v in text_encoder.items()}
    write(transformer_to_diffusers(load_file(assets / TRANSFORMER)), trained / "transformer.safetensors")  # fmt: skip
    write(vae_to_diffusers(load_file(assets / VAE)), trained / "vae.safetensors")
    write(text_encoder, trained / "text_encoder.safetensors")
    (trained / "vocabulary.json").write_text(json.dumps(vocabulary))


def write(state_dict: dict[str, torch.Tensor], target: Path) -> None:
    """Save one file and say how large it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state_dict.items()}, target, metadata={"format": "pt"})
    print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB, {len(state_dict)} tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a training run")
    parser.add_argument("--unpack", action="store_true", help="write the folder, do not read it")
    args = parser.parse_args()
    (unpack if args.unpack else pack)(args.folder)
