"""Run inside a host's Python path: `residency_run.py HOST PACK_PARENT OUT`; what ResidentPatcher does, as JSON.

On a machine without a GPU the patcher is told to treat the CPU as a device that weights are sent to, so that sending,
recalling and patching are the real thing, only the link is not.
"""

import hashlib
import json
import logging.handlers
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
from tiny_klein import KLEIN, QKV, with_lora, write_fp8  # noqa: E402

from ark.nodes.loaded import Loaded  # noqa: E402
from ark.nodes.prepare import prepare  # noqa: E402
from ark.patches import text_encoder, warmup  # noqa: E402
from ark.patches.residency import ResidentPatcher  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.toolkit import igniter  # noqa: E402
from ark.toolkit.embedded import ASSETS, embedded_text_encoder  # noqa: E402
from ark.toolkit.paths import mmap_pin  # noqa: E402

VAE = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"
CPU = torch.device("cpu")
igniter.IN_MEMORY = 0  # map the small files, too, as large ones are
found = {}


def sample(model):
    torch.manual_seed(0)
    positive = [[torch.randn(1, 32, 192), {"pooled_output": None}]]
    return sample_klein(model, positive, {"samples": torch.zeros(1, 128, 4, 4)}, 7, 2, 1.0)[
        "samples"
    ]


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
    states = [model.is_loaded(), model.clone().is_loaded(), with_lora(model, 1.0).is_loaded()]
    found["left_ahead"] = len(model.masters.opened.ahead)
    lora = with_lora(model, 1.0)
    found["lora_same"] = torch.equal(sample(lora), expected_lora[1.0])
    states += [lora.is_loaded(), model.is_loaded()]
    found["backup_is_home"] = (
        model.backup[QKV].weight.data_ptr() == model.masters.homes[QKV].data_ptr()
    )
    found["lora_strength_same"] = torch.equal(sample(with_lora(model, 0.5)), expected_lora[0.5])
    found["lora_gone"] = torch.equal(sample(model), expected)
    states += [lora.is_loaded(), model.is_loaded()]
    comfy.model_management.unload_all_models()
    found["loaded"] = [*states, model.is_loaded()]
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
del with_grad
with torch.inference_mode():
    # weights that stay off the device lie in pinned memory of the file
    model, _ = load_transformer(KLEIN)
    copies = {}

    def pinned_bytes(file, device):
        copies[file.identity] = torch.frombuffer(
            bytearray(file.path.read_bytes()), dtype=torch.uint8
        )
        return copies[file.identity]

    real, mmap_pin.pinned_bytes = mmap_pin.pinned_bytes, pinned_bytes
    model.patch_model(CPU, lowvram_model_memory=1)
    (flat,) = copies.values()
    inside = [
        flat.data_ptr() <= weight.data_ptr() < flat.data_ptr() + flat.numel()
        for weight in model.model.parameters()
    ]
    found["offloaded_pinned"] = [sum(inside), len(inside), len(model.pinned)]
    model.masters.make_writable(model.model, QKV)  # as before a hook writes into it
    now = dict(model.model.named_parameters())[QKV]
    found["writable_again"] = now.data_ptr() == model.masters.homes[QKV].data_ptr()
    x, sigma = torch.randn(1, 128, 4, 4), torch.ones(1)
    context = torch.randn(1, 32, 192)
    partly = model.model.apply_model(x, sigma, c_crossattn=context)
    # of what was loaded (here a copy stands for it) a part leaves: nothing of it is copied back
    model.unpatch_model(CPU)
    model.patch_model(CPU, lowvram_model_memory=3 * size // 4)
    loaded = [m for m in model.model.modules() if getattr(m, "comfy_patched_weights", False)]
    loaded = [part for part in loaded if getattr(part, "weight", None) is not None]
    for part in loaded:
        part.weight = torch.nn.Parameter(part.weight.clone(), requires_grad=False)
    copies_now = {part.weight.data_ptr() for part in loaded}
    found["dropped_bytes"] = [model.partially_unload(CPU, size // 8), size // 8]
    left = copies_now & {weight.data_ptr() for weight in model.model.parameters()}
    gone = [part for part in loaded if not part.comfy_patched_weights]
    found["dropped"] = [len(loaded), len(gone), len(left)]
    found["moves_are_the_modules_own"] = not any("to" in vars(m) for m in model.model.modules())
    found["dropped_same"] = torch.equal(
        model.model.apply_model(x, sigma, c_crossattn=context), partly
    )
    model.unpatch_model(CPU)
    mmap_pin.pinned_bytes = real
    found["home_after_offloading"] = home(model)
    model.patch_model(CPU)
    whole = model.model.apply_model(x, sigma, c_crossattn=context)
    found["offloaded_same"] = torch.equal(partly, whole)
    model.unpatch_model(CPU)

    # quantised weights, too, come from their file and return to it
    found["quantised"] = {}
    for form in ("by_metadata", "scaled"):
        fp8 = write_fp8(out.with_name(f"{form}.safetensors"), form)
        results = []
        for devices in ((), ("cuda", "cpu")):
            ResidentPatcher.fast_devices = devices
            model, _ = load_transformer(fp8)
            results.append(sample(model))
            homes = [home(model)]
            sizes = [model.model_size(), comfy.model_management.module_size(model.model)]
            comfy.model_management.unload_all_models()
            homes.append(home(model))
            results.append(sample(model))
            results.append(sample(with_lora(model, 1.0)))
            comfy.model_management.unload_all_models()
            homes.append(home(model))
            results.append(sample(model))
            comfy.model_management.unload_all_models()
        by_host, by_ark = results[:4], results[4:]
        found["quantised"][form] = {
            "same": [torch.equal(a, b) for a, b in zip(by_host, by_ark, strict=True)],
            "stays": torch.equal(by_ark[0], by_ark[1]) and torch.equal(by_ark[0], by_ark[3]),
            "homes": homes,
            "sizes": sizes,
            "differs": not torch.equal(by_ark[0], expected),
        }

    # a VAE is cast where it is used, and stays at home as the file has it
    real, comfy.model_management.vae_dtype = (
        comfy.model_management.vae_dtype,
        lambda *_, **__: torch.bfloat16,
    )
    decoded = []
    for devices in ((), ("cuda", "cpu")):
        ResidentPatcher.fast_devices = devices
        vae, _ = load_vae(VAE)
        decoded.append(vae.decode(expected))
        dtypes = {str(weight.dtype) for weight in vae.first_stage_model.parameters()}
        found["vae_used_as"] = [*found.get("vae_used_as", []), sorted(dtypes)]
        comfy.model_management.unload_all_models()
        found["vae_home"] = [*found.get("vae_home", []), home(vae.patcher)]
    found["vae_same"] = torch.equal(*decoded)
    comfy.model_management.vae_dtype = real

    # the user stops while weights are on their way; the next run has them
    model, _ = load_transformer(KLEIN)
    comfy.model_management.interrupt_current_processing(True)
    try:
        sample(model)
        found["interrupted"] = False
    except comfy.model_management.InterruptProcessingException:
        found["interrupted"] = len(model.masters.opened.ahead)
    found["after_interrupt"] = torch.equal(sample(model), expected)
    comfy.model_management.unload_all_models()

    # whoever loads the text encoder will want the transformer: it leaves, too, unless it is there
    model, _ = load_transformer(KLEIN, ahead=False)
    clip, _ = load_text_encoder(embedded_text_encoder(), ahead=False)
    clip.patcher.lead(model)
    for _ in range(2):
        comfy.model_management.load_models_gpu([clip.patcher])
        found["led"] = [*found.get("led", []), len(model.masters.opened.ahead)]
        found["led_same"] = torch.equal(sample(model), expected)
        clip.patcher.detach()
        comfy.model_management.load_models_gpu([clip.patcher])
        found["led"].append(len(model.masters.opened.ahead))
        comfy.model_management.unload_all_models()
    del model
    comfy.model_management.load_models_gpu([clip.patcher])  # alone
    comfy.model_management.unload_all_models()

    # the loader's node hears of transfers that end after it
    model, _ = load_transformer(KLEIN, ahead=False)  # else it may have ended before
    loaded, heard = Loaded({"diffusion_model": model}, 1, 0.1), []
    loaded.listen(lambda: heard.append(len(loaded.lines())))
    sample(model)
    found["resident"] = [loaded.facts()["resident"][0]["bytes"]]
    comfy.model_management.unload_all_models()
    found["resident"].append(loaded.facts()["resident"][0]["bytes"])
    found["report"], found["heard"] = loaded.lines(), len(heard)

    # while a server idles, the tokenizer is built
    text_encoder._build_tokenizer.cache_clear()
    prepare()
    found["tokenizers_prepared"] = text_encoder._build_tokenizer.cache_info().currsize
    load_text_encoder(embedded_text_encoder())[0].tokenize("a red circle")
    found["tokenizers_built"] = text_encoder._build_tokenizer.cache_info().misses

    # one layer of each part runs once
    warnings = logging.handlers.MemoryHandler(1000)
    logging.getLogger("ark").addHandler(warnings)
    warmup.DEVICES = ("cpu",)
    for _ in range(2):
        load_text_encoder(embedded_text_encoder(), ahead=False)
        load_transformer(KLEIN, ahead=False)
        load_vae(VAE, ahead=False)
        warmup.settle()
        found["warmed"] = [*found.get("warmed", []), sorted(part for part, *_ in warmup._seen)]
    found["warm_up_warnings"] = [
        record.getMessage() for record in warnings.buffer if record.levelno >= logging.WARNING
    ]
found["file_unchanged"] = hashlib.sha256(KLEIN.read_bytes()).hexdigest() == before
out.write_text(json.dumps(found))
