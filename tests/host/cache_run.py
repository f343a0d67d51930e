"""Run inside a host's Python path: `cache_run.py HOST PACK_PARENT ENCODER OUT PHASE`; embeddings kept, as JSON.

PHASE is "first", or "again" in a process of its own afterwards: a restart.
"""

import json
import os
import sys
from pathlib import Path

host, pack_parent, encoder_file, out = (Path(arg) for arg in sys.argv[1:5])
phase = sys.argv[5]
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.text_encoders.llama  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN, difference  # noqa: E402

from ark.nodes.encode import ArkTextEncode  # noqa: E402
from ark.patches.residency import ResidentPatcher  # noqa: E402
from ark.patches.text_encoder import ENCODER, load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.toolkit import igniter  # noqa: E402

PROMPT, KEPT = (
    "a small red circle to the left of a large blue star",
    out.with_name("kept.safetensors"),
)
igniter.IN_MEMORY = 0  # map the small files, too, as large ones are
ResidentPatcher.fast_devices = ("cuda", "cpu")  # and send them
found = {"same": {}, "off": {}, "differs": {}, "sources": {}}
counts = {"loads": 0, "forwards": 0}
load, forward = ResidentPatcher.load, comfy.text_encoders.llama.Llama2_.forward


def counted_load(self, *given, **named):
    counts["loads"] += 1
    return load(self, *given, **named)


def counted_forward(self, *given, **named):
    counts["forwards"] += 1
    return forward(self, *given, **named)


ResidentPatcher.load, comfy.text_encoders.llama.Llama2_.forward = counted_load, counted_forward


def encode(name, clip, tokens):
    """The conditioning; notes where it came from, and what was loaded and run for it."""
    before = dict(counts)
    if isinstance(tokens, str):
        tokens = clip.tokenize(tokens)
    result = clip.encode_from_tokens_scheduled(tokens)
    found["sources"][name] = [clip.source, *(counts[kind] - before[kind] for kind in counts)]
    return result


def by_host(clip, tokens):
    """What the host's own layers give, asked directly."""
    comfy.model_management.load_models_gpu([clip.patcher])
    return clip.cond_stage_model.encode_token_weights(tokens)[0]


def same(name, result, expected):
    found["same"][name] = torch.equal(result[0][0].view(torch.int32), expected.view(torch.int32))


def same_as_host(name, result, clip, tokens):
    """To the bit, NaN too. Once, on a busy machine, the first run of a process rounded otherwise: then both are asked anew."""
    found["off"][name] = difference(result[0][0], by_host(clip, tokens))
    for _ in range(3):
        same(name, result, by_host(clip, tokens))
        if found["same"][name]:
            break
        kept, clip.embeddings = clip.embeddings, None
        result, clip.embeddings = clip.encode_from_tokens_scheduled(tokens), kept


def differs(name, result, expected):
    found["differs"][name] = difference(result[0][0], expected)


def saved():
    return sorted(Path(os.environ["ARK_CACHE_DIR"]).glob("embeddings/*/*.safetensors"))


def first_run():
    clip, _ = load_text_encoder(encoder_file)
    found["ahead"] = len(clip.patcher.masters.opened.ahead)
    tokens = clip.tokenize(PROMPT)
    result = encode("new", clip, tokens)
    plain = result[0][0]
    same_as_host("new", result, clip, tokens)
    again = encode("again", clip, PROMPT)
    same("again", again, plain)
    found["keys"] = [sorted(result[0][1]), sorted(again[0][1])]
    again[0][1]["mine"] = 1
    found["own_dict"] = "mine" not in encode("own dict", clip, PROMPT)[0][1]
    shapes = clip.encode_from_tokens(tokens), clip.encode_from_tokens(tokens, return_pooled=True)
    found["forms"] = torch.equal(shapes[0], plain) and torch.equal(shapes[1][0], plain) and shapes[1][1] is None  # fmt: skip

    # tokens are remembered; what a node writes into its own changes nobody else's
    mine, of_host = clip.tokenize(PROMPT), clip.tokenizer.tokenize_with_weights(PROMPT)
    found["tokens"] = [mine == of_host, mine[ENCODER][0] is not clip.tokenize(PROMPT)[ENCODER][0]]
    mine[ENCODER][0][0] = (0, 2.0)
    found["tokens"].append(clip.clone().tokenize(PROMPT) == of_host)

    # what the host's syntax makes of a prompt is what counts
    word = encode("word", clip, PROMPT.replace("red", "(red:1.3)"))
    same_as_host("word", word, clip, clip.tokenize(PROMPT.replace("red", "(red:1.3)")))
    differs("word", word, plain)
    pairs = [(pair[0], 1.3 if at == 1 else 1.0) for at, pair in enumerate(tokens[ENCODER][0])]
    weighted = encode("weights", clip, {ENCODER: [pairs]})
    same_as_host("weights", weighted, clip, {ENCODER: [pairs]})
    same("weights again", encode("weights again", clip, {ENCODER: [pairs]}), weighted[0][0])
    found["weights_finite"] = bool(weighted[0][0].isfinite().all())  # 0.3.75 makes NaN of them
    if found["weights_finite"]:
        differs("weights", weighted, plain)
    torch.manual_seed(0)
    for number in range(2):
        embedding = {ENCODER: [[(torch.randn(64), 1.0), *tokens[ENCODER][0]]]}
        name = f"embedding {number}"
        same_as_host(name, encode(name, clip, embedding), clip, embedding)
    clip.embeddings.settle()
    found["saved"] = len(saved())

    # a LoRA
    key = f"{ENCODER}.transformer.model.layers.3.mlp.down_proj.weight"
    delta = torch.randn(dict(clip.cond_stage_model.named_parameters())[key].shape) * 0.05
    lora = clip.clone()
    lora.add_patches({key: ("diff", (delta,))}, 1.0)
    patched = encode("lora", lora, PROMPT)
    same_as_host("lora", patched, lora, tokens)
    differs("lora", patched, plain)
    same("lora again", encode("lora again", lora.clone(), PROMPT), patched[0][0])
    same("without lora", encode("without lora", clip, PROMPT), plain)
    other = clip.clone()
    other.add_patches({key: ("diff", (delta,))}, 0.5)
    differs("lora strength", encode("lora strength", other, PROMPT), patched[0][0])

    # hooks of others
    hooked = clip.clone()
    hooked.apply_hooks_to_conds = comfy.hooks.HookGroup()
    hooked.apply_hooks_to_conds.add(comfy.hooks.TransformerOptionsHook())
    result = encode("hooks", hooked, PROMPT)
    found["hooks_arrive"] = "hooks" in result[0][1]
    layer = getattr(clip.cond_stage_model, ENCODER).transformer.model.layers[2]

    def double(module, given, out):
        return 2 * out if torch.is_tensor(out) else (2 * out[0], *out[1:])

    handle = layer.register_forward_hook(double)
    differs("forward hook", encode("forward hook", clip, PROMPT), plain)
    handle.remove()
    same("hooks gone", encode("hooks gone", clip, PROMPT), plain)
    wrapped = clip.clone()
    wrapped.patcher.add_object_patch(f"{ENCODER}.num_layers", 27)
    encode("object patch", wrapped, PROMPT)
    found["bypassed"] = len(clip.bypassed)
    clip.embeddings.settle()
    found["saved_at_last"] = len(saved())

    # the node
    node = ArkTextEncode.execute(clip, PROMPT)
    same("node", node.result[0], plain)
    found["node_says"] = node.ui["text"]
    try:
        ArkTextEncode.execute(None, PROMPT)
    except Exception as error:
        found["no_clip"] = str(error)
    save_file({"plain": plain.contiguous()}, KEPT)


def second_run():
    plain = load_file(KEPT)["plain"]
    model, _ = load_transformer(KLEIN, ahead=False)
    clip, _ = load_text_encoder(encoder_file)
    clip.patcher.lead(model)
    found["ahead"] = len(clip.patcher.masters.opened.ahead)
    result = encode("restart", clip, PROMPT)
    same("restart", result, plain)
    found["keys"] = [sorted(result[0][1])] * 2
    found["transformer_ahead"] = len(model.masters.opened.ahead)
    found["reports"] = len(clip.patcher.masters.opened.reports)
    found["loaded"] = clip.patcher in [known.model for known in comfy.model_management.current_loaded_models]  # fmt: skip
    same("in memory", encode("in memory", clip, PROMPT), plain)
    fresh = encode("fresh", clip, "a green square")
    same_as_host("fresh", fresh, clip, clip.tokenize("a green square"))

    for path in saved():
        path.write_bytes(path.read_bytes()[:-7])
    for name in ("damaged", "mended"):
        clip, _ = load_text_encoder(encoder_file)
        result = encode(name, clip, PROMPT)
        clip.embeddings.settle()
        same_as_host(name, result, clip, clip.tokenize(PROMPT))

    os.utime(encoder_file, (1e9, 1e9))
    clip, _ = load_text_encoder(encoder_file)
    found["ahead_of_changed"] = len(clip.patcher.masters.opened.ahead)
    same_as_host("changed file", encode("changed file", clip, PROMPT), clip, clip.tokenize(PROMPT))


with torch.inference_mode():
    {"first": first_run, "again": second_run}[phase]()
out.write_text(json.dumps(found))
