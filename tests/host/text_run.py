"""Run inside a host's Python path: `text_run.py HOST PACK_PARENT OUT`; the text engine against the host's own layers, as JSON."""

import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.sd  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import difference  # noqa: E402

from ark.patches.text_encoder import ENCODER, embed_tokens, load_text_encoder  # noqa: E402
from ark.toolkit import text_engine  # noqa: E402
from ark.toolkit.embedded import embedded_text_encoder  # noqa: E402

PROMPTS = {
    "plain": "a small red circle to the left of a large blue star on a white background",
    "empty": "",
    "long": "a small red circle and " * 200,
}
found = {"errors": {}}


def encode(clip, text):
    """Without the cache of embeddings."""
    return comfy.sd.CLIP.encode_from_tokens(clip, clip.tokenize(text))


def engine_on(on, *dtypes):
    """Whether the engine takes weights of these dtypes on a CPU."""
    text_engine.DEVICES, text_engine.DTYPES = ("cpu",) if on else ("cuda",), dtypes
    model.engine.weights_changed()


def host_in_bf16(text):
    """The host's own layers, all of it in bf16."""
    tokens = [[pair[0] for pair in clip.tokenize(text)[ENCODER][0]]]
    embeds, present, *rest = model.process_tokens(tokens, torch.device("cpu"))
    states = model.transformer(
        None, present, embeds=embeds.bfloat16(), num_tokens=rest[0], intermediate_output=model.layer,
        final_layer_norm_intermediate=False, dtype=torch.bfloat16,
    )[1]  # fmt: skip
    assert states.dtype == torch.bfloat16
    return states.movedim(1, 2).flatten(2).float()


with torch.inference_mode():
    clip, _ = load_text_encoder(embedded_text_encoder())
    model = getattr(clip.cond_stage_model, ENCODER)
    expected = {
        name: encode(clip, text) for name, text in PROMPTS.items()
    }  # bf16 weights, fp32 arithmetic
    found["host_ran"], found["reasons"] = model.engine._layers is None, sorted(model.engine.reasons)

    # in bf16 it is no further off than the host in bf16
    engine_on(True, torch.bfloat16)
    found["bf16"] = [
        [difference(encode(clip, text), expected[name]), difference(host_in_bf16(text), expected[name])]
        for name, text in PROMPTS.items()
    ]  # fmt: skip
    found["bf16_layers"] = len(model.engine._layers)

    # the tokens as the host reads them: usual ones, several sections, padding first, embeddings of a file among them
    plain = [pair[0] for pair in clip.tokenize(PROMPTS["plain"])[ENCODER][0]]
    for tokens in (
        [plain],
        [plain, plain[5:] + plain[:5]],
        [plain[::-1]],
        [[torch.ones(64), *plain]],
        [plain[:9]],
    ):
        mine, host_s = (
            embed_tokens(model, tokens, torch.device("cpu")),
            model.process_tokens(tokens, torch.device("cpu")),
        )
        found["embedded"] = [*found.get("embedded", []), *map(torch.equal, mine, host_s[:2])]

    # the rest in fp32
    model.transformer.float()
    engine_on(True, torch.float32)
    for name, text in PROMPTS.items():
        result = encode(clip, text)
        found["errors"][name] = difference(result, expected[name])
        found[f"{name}_shape"] = [list(result.shape), list(expected[name].shape)]
    found["engine_ran"] = model.engine._layers is not None

    # several sections, one of nothing but padding, and weights, of which the host applies the first three, one to each tap
    tokens = clip.tokenize(PROMPTS["plain"])[ENCODER][0]
    crafted = {
        "sections": [tokens, [(151643, 1.0)] * 512, tokens],
        "weights": [[(id, 1.3 if at == 1 else 1.0) for at, (id, _) in enumerate(tokens)]],
    }
    for name, sections in crafted.items():
        results = []
        for on in (True, False):
            engine_on(on, torch.float32)
            results.append(clip.cond_stage_model.encode_token_weights({ENCODER: sections}))
        found["errors"][name] = difference(results[0][0], results[1][0])
        found[f"{name}_masks_equal"] = torch.equal(results[0][2]["attention_mask"], results[1][2]["attention_mask"])  # fmt: skip
        found[f"{name}_finite"] = [bool(result[0].isfinite().all()) for result in results]
        found[f"{name}_matter"] = difference(results[1][0][:, :512], expected["plain"])

    # a LoRA of the text encoder
    key = f"{ENCODER}.transformer.model.layers.3.mlp.down_proj.weight"
    torch.manual_seed(0)
    delta = torch.randn(dict(clip.cond_stage_model.named_parameters())[key].shape) * 0.05
    with_lora = clip.clone()
    with_lora.add_patches({key: ("diff", (delta,))}, 1.0)
    engine_on(True, torch.float32)
    by_engine = encode(with_lora, PROMPTS["plain"])
    engine_on(False)
    by_host = encode(with_lora, PROMPTS["plain"])
    found["errors"]["lora"] = difference(by_engine, by_host)
    found["lora_matters"] = difference(by_host, expected["plain"])
    engine_on(True, torch.float32)
    found["errors"]["lora_removed"] = difference(encode(clip, PROMPTS["plain"]), expected["plain"])

    # hooks of others
    def double(module, given, out):
        return 2 * out if torch.is_tensor(out) else (2 * out[0], *out[1:])

    handle = model.transformer.model.layers[2].register_forward_hook(double)
    found["hook_matters"] = difference(encode(clip, PROMPTS["plain"]), expected["plain"])
    handle.remove()
    found["errors"]["hook_removed"] = difference(encode(clip, PROMPTS["plain"]), expected["plain"])
    found["all_reasons"] = sorted(model.engine.reasons)
out.write_text(json.dumps(found))
