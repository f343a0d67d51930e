"""Run inside a host's Python path: `golden_run.py HOST PACK_PARENT MODELS OUT`; saves Ark's and the stock results.

Everything on CPU in fp32. The stock side uses the host's own classes and sampler nodes, nothing of Ark's.
"""

import sys
from pathlib import Path

host, pack_parent, models, out = (Path(arg) for arg in sys.argv[1:5])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import comfy.text_encoders.llama  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_flux import Flux2Scheduler  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

sys.path.append(str(pack_parent))
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402

PROMPT = "a small red circle to the left of a large blue star on a white background"
SEED, WIDTH, HEIGHT = 7, 256, 192
found = {}


def stock_transformer():
    """The host's own class with the file's weights, as its UNETLoader would build it if it knew the head count."""
    state_dict = load_file(models / "transformer_comfy.safetensors")
    config = comfy.model_detection.detect_unet_config(state_dict, "")
    config["num_heads"] = 2
    model_config = comfy.model_detection.model_config_from_unet_config(config, state_dict)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(state_dict, "")
    model.load_model_weights(dict(state_dict), "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def stock_text_model():
    """0.33.0's klein_te; on 0.3.75, which has none, its own parts put together in the same way."""
    flux = comfy.text_encoders.flux
    if hasattr(flux, "klein_te"):
        return flux.klein_te(dtype_llama=torch.float32)

    class Qwen3(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None, **_):
            super().__init__(
                device=device, dtype=dtype, layer=[9, 18, 27], textmodel_json_config={}, special_tokens={"pad": 151643},
                layer_norm_hidden_state=False, model_class=comfy.text_encoders.llama.Qwen3_4B,
                enable_attention_masks=True, return_attention_masks=True, model_options=model_options,
            )  # fmt: skip

    def text_model(device="cpu", dtype=None, model_options=None):
        return flux.Flux2TEModel(
            device=device, dtype=torch.float32, name="qwen3_4b", clip_model=Qwen3, model_options=model_options
        )  # fmt: skip

    return text_model


def stock_conditioning(tokens):
    """The conditioning of all the layers of the file, by nothing of Ark's."""
    tokenizer = type("Tokenizer", (), {"__init__": lambda self, **_: None})
    target = type(
        "Target",
        (),
        {"params": {}, "clip": staticmethod(stock_text_model()), "tokenizer": tokenizer},
    )
    dims = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 28,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    clip = comfy.sd.CLIP(target, model_options={"qwen3_4b_model_config": dims})
    clip.load_sd(load_file(models / "text_encoder.safetensors"))
    return clip.encode_from_tokens_scheduled(tokens)


with torch.inference_mode():
    model, _ = load_transformer(models / "transformer.safetensors")
    clip, _ = load_text_encoder(models / "text_encoder.safetensors")
    vae, _ = load_vae(models / "vae.safetensors")
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    found["conditioning"] = positive[0][0]
    found["tokens"] = torch.tensor([[pair[0] for pair in clip.tokenize(PROMPT)["qwen3_4b"][0]]])
    found["stock_conditioning"] = stock_conditioning(clip.tokenize(PROMPT))[0][0]
    found["layers"] = torch.tensor(len(clip.cond_stage_model.qwen3_4b.transformer.model.layers))
    if hasattr(comfy.text_encoders.flux, "KleinTokenizer"):
        stock = comfy.text_encoders.flux.KleinTokenizer().tokenize_with_weights(PROMPT)
        found["stock_tokens"] = torch.tensor([[pair[0] for pair in stock["qwen3_4b"][0]]])

    latent = {"samples": torch.zeros(1, 128, HEIGHT // 16, WIDTH // 16)}
    found["noise"] = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    found["latents"] = sample_klein(model, positive, latent, SEED, 4, 1.0)["samples"]
    found["image"] = vae.decode(found["latents"])

    guider = comfy.samplers.CFGGuider(stock_transformer())
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    sigmas = Flux2Scheduler.execute(4, WIDTH, HEIGHT).result[0]
    found["sigmas"] = sigmas
    found["stock_latents"] = guider.sample(
        found["noise"],
        latent["samples"],
        comfy.samplers.sampler_object("euler"),
        sigmas,
        seed=SEED,
        disable_pbar=True,
    )
save_file({key: value.float().contiguous() for key, value in found.items()}, out)
