"""Turn what `train.py` wrote into the files that ship: `python assets/pack.py TRAINED_DIR` (needs the pack as `ark`).

The same names, layout and dtype as the files published for ComfyUI; every dimension stays in the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ark.toolkit.embedded import ASSETS, COMPACT
from ark.toolkit.keys import transformer_from_diffusers, vae_from_diffusers


def main(trained: Path) -> None:
    transformer = transformer_from_diffusers(load_file(trained / "transformer.safetensors"))
    vae = vae_from_diffusers(load_file(trained / "vae.safetensors"))
    text_encoder = {
        f"model.{k}": v for k, v in load_file(trained / "text_encoder.safetensors").items()
    }
    vocabulary = json.loads((trained / "vocabulary.json").read_text())
    text_encoder["token_ids"] = torch.tensor(vocabulary, dtype=torch.int64)
    for folder in ("diffusion_models", "vae"):
        (ASSETS / folder).mkdir(exist_ok=True)
    for target, state_dict in (
        (ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors", transformer),
        (ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors", vae),
        (COMPACT, text_encoder),
    ):
        save_file(
            {k: v.contiguous() for k, v in state_dict.items()}, target, metadata={"format": "pt"}
        )
        print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB, {len(state_dict)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
