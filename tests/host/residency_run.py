"""Run inside a host's Python path: `residency_run.py HOST PACK_PARENT OUT`; what ResidentPatcher does, as JSON.

On a machine without a GPU the patcher is told to treat the CPU as a device that weights are sent to, so that sending,
recalling and patching are the real thing, only the link is not.
"""

import hashlib
import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_management  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from ark.patches.residency import ResidentPatcher  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.toolkit import igniter  # noqa: E402
from ark.toolkit.embedded import ASSETS, embedded_text_encoder  # noqa: E402

KLEIN = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
VAE = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"
KEY = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
CPU = torch.device("cpu")
igniter.IN_MEMORY = 0  # map the small files, too, as large ones are
found = {}


def sample(model):
    torch.manual_seed(0)
    positive = [[torch.randn(1, 32, 192), {"pooled_output": None}]]
    return sample_klein(model, positive, {"samples": torch.zeros(1, 128, 4, 4)}, 7, 2, 1.0)[
        "samples"
    ]


def with_lora(model, strength):
    torch.manual_seed(1)
    patched = model.clone()
    shape = patched.model.state_dict()[KEY].shape
    assert patched.add_patches({KEY: ("diff", (torch.randn(shape) * 0.02,))}, strength)
    return patched


def home(model):
    """How many weights are views of their file, of how many."""
    return [len(model.masters.at_home(model.model)), len(model.masters.homes)]


before = hashlib.sha256(KLEIN.read_bytes()).hexdigest()
with torch.inference_mode():
    ResidentPatcher.fast_devices = ()  # the host moves the weights: what to compare with
    plain, _ = load_transformer(KLEIN)
    expected = sample(plain)
    expected_lora = {s: sample(with_lora(plain, s)) for s in (1.0, 0.5)}
    found["lora_matters"] = not torch.equal(expected, expected_lora[1.0])
    comfy.model_management.unload_all_models()

    ResidentPatcher.fast_devices = ("cuda", "cpu")
    model, _ = load_transformer(KLEIN)
    found["home_at_first"] = home(model)
    found["sent_ahead"] = len(model.masters.opened.ahead)
    found["same"] = torch.equal(sample(model), expected)
    found["home_when_loaded"] = home(model)
    found["left_ahead"] = len(model.masters.opened.ahead)
    lora = with_lora(model, 1.0)
    found["lora_same"] = torch.equal(sample(lora), expected_lora[1.0])
    found["backup_is_home"] = (
        model.backup[KEY].weight.data_ptr() == model.masters.homes[KEY].data_ptr()
    )
    found["lora_strength_same"] = torch.equal(sample(with_lora(model, 0.5)), expected_lora[0.5])
    found["lora_gone"] = torch.equal(sample(model), expected)
    comfy.model_management.unload_all_models()
    found["home_when_unloaded"] = home(model)
    found["after_reload"] = torch.equal(sample(model), expected)
    size = model.model_size()
    found["freed"] = [model.partially_unload(CPU, size // 3), size]
    found["after_partial_unload"] = torch.equal(sample(model), expected)
    comfy.model_management.unload_all_models()
    found["home_at_last"] = home(model)
    anew = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    found["anew"] = [anew.model is not model.model, torch.equal(sample(anew), expected)]
    merged = model.clone()
    merged.add_patches(anew.get_key_patches("diffusion_model."), 0.5, 0.5)  # as ModelMergeSimple
    found["merged_with_itself"] = float((sample(merged) - expected).abs().max())
    comfy.model_management.unload_all_models()

    clip, _ = load_text_encoder(embedded_text_encoder())
    vae, _ = load_vae(VAE)
    clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    vae.decode(expected)
    for name, patcher in (("clip", clip.patcher), ("vae", vae.patcher)):
        found[name] = [type(patcher).__name__, home(patcher)]
        again = patcher.cached_patcher_init[0](*patcher.cached_patcher_init[1])
        found[f"{name}_anew"] = type(again).__name__
igniter.IN_MEMORY = 1 << 30
with (
    torch.inference_mode()
):  # a small file, read whole, gone since: the model comes back from memory
    copy = out.with_name("copy.safetensors")
    copy.write_bytes(KLEIN.read_bytes())
    small, _ = load_transformer(copy)
    found["small_same"] = torch.equal(sample(small), expected)
    comfy.model_management.unload_all_models()
    copy.unlink()
    found["small_same_without_file"] = torch.equal(sample(small), expected)
    comfy.model_management.unload_all_models()
igniter.IN_MEMORY = 0
with_grad = load_transformer(KLEIN)[0]
comfy.model_management.load_models_gpu([with_grad], force_full_load=True)
found["outside_inference_mode"] = home(with_grad)
found["file_unchanged"] = hashlib.sha256(KLEIN.read_bytes()).hexdigest() == before
out.write_text(json.dumps(found))
