"""Run inside a host's Python path: `edit_run.py HOST PACK_PARENT PICTURE OUT`; saves an edit by the embedded model.

What ArkFastLoader, ArkTextEncode, ArkReferenceImages and ArkSampler4Step do, on CPU in fp32. PICTURE holds "image",
[1, H, W, 3] from 0 to 1.
"""

import sys
from pathlib import Path

host, pack_parent, picture, out = (Path(arg) for arg in sys.argv[1:5])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.sample  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

sys.path.append(str(pack_parent))
from ark.patches.references import add_references  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.toolkit.embedded import embedded_folders  # noqa: E402

INSTRUCTION, SEED = "on a black background", 7
found = {}
with torch.inference_mode():
    folders = embedded_folders()
    model, _ = load_transformer(folders["diffusion_models"] / "ark_tiny_klein.safetensors")
    clip, _ = load_text_encoder(folders["text_encoders"] / "ark_tiny_qwen3.safetensors")
    vae, _ = load_vae(folders["vae"] / "ark_tiny_flux2_vae.safetensors")
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(INSTRUCTION))
    positive, latent = add_references(prompt, vae, [load_file(picture)["image"]], 1.0)
    found["conditioning"] = prompt[0][0]
    (found["reference"],) = positive[0][1]["reference_latents"]
    found["noise"] = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    found["latents"] = sample_klein(model, positive, latent, SEED, 4, 1.0)["samples"]
save_file({key: value.float().contiguous() for key, value in found.items()}, out)
