"""Run inside a host's Python path: `text_run.py HOST PACK_PARENT OUT`; the text engine against the host's own layers, as JSON."""

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
from tiny_klein import difference  # noqa: E402

from ark.patches import text_engine  # noqa: E402
from ark.patches.text_encoder import ENCODER, load_text_encoder  # noqa: E402
from ark.toolkit.embedded import embedded_text_encoder  # noqa: E402

PROMPTS = {
    "plain": "a small red circle to the left of a large blue star on a white background",
    "empty": "",
    "long": "a small red circle and " * 200,
}
found = {"errors": {}}


def encode(clip, text):
    return clip.encode_from_tokens(clip.tokenize(text))


with torch.inference_mode():
    clip, _ = load_text_encoder(embedded_text_encoder())
    model = getattr(clip.cond_stage_model, ENCODER)
    expected = {name: encode(clip, text) for name, text in PROMPTS.items()}
    found["host_ran"] = model.engine._layers is None
    text_engine.DEVICES, text_engine.HALF = ("cpu",), (torch.float32, torch.bfloat16)
    for name, text in PROMPTS.items():
        result = encode(clip, text)
        found["errors"][name] = difference(result, expected[name])
        found[f"{name}_shape"] = [list(result.shape), list(expected[name].shape)]
    found["engine_ran"] = model.engine._layers is not None

    # a LoRA of the text encoder
    key = f"{ENCODER}.transformer.model.layers.3.mlp.down_proj.weight"
    torch.manual_seed(0)
    weight = dict(clip.cond_stage_model.named_parameters())[key]
    delta = torch.randn(weight.shape) * 0.05
    with_lora = clip.clone()
    with_lora.add_patches({key: ("diff", (delta,))}, 1.0)
    by_engine = encode(with_lora, PROMPTS["plain"])
    text_engine.DEVICES = ()
    model.engine.weights_changed()
    by_host = encode(with_lora, PROMPTS["plain"])
    found["errors"]["lora"] = difference(by_engine, by_host)
    found["lora_matters"] = difference(by_host, expected["plain"])
    text_engine.DEVICES = ("cpu",)
    found["errors"]["lora_removed"] = difference(encode(clip, PROMPTS["plain"]), expected["plain"])

    # in bf16 it is as far off as bf16 is
    model.engine.weights_changed()
    model.bfloat16()
    found["bf16_error"] = difference(encode(clip, PROMPTS["plain"]).float(), expected["plain"])
out.write_text(json.dumps(found))
