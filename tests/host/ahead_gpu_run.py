"""Run inside a host's Python path, on a GPU: `ahead_gpu_run.py HOST PACK_PARENT OUT`; what is begun before it is asked for, as JSON."""

import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = not torch.cuda.is_available()
import nodes as stock  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN  # noqa: E402

from ark.patches import first_step, sampling  # noqa: E402
from ark.patches.attention import set_attention  # noqa: E402
from ark.patches.fused import engine_on, set_fused  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.patches.warmup import settle  # noqa: E402
from ark.toolkit.embedded import ASSETS, embedded_text_encoder  # noqa: E402
from ark.toolkit.fused.runner import Runner  # noqa: E402

found: dict = {}


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


with torch.inference_mode():
    clip, _ = load_text_encoder(embedded_text_encoder())
    fresh, _ = load_text_encoder(embedded_text_encoder())
    vae, _ = load_vae(ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors")
    model, _ = set_fused(set_attention(load_transformer(KLEIN)[0], "auto")[0])
    settle()

    # texts: begun where a recording is replayed, which the first ones lead to
    texts = found["texts"] = []
    for number in range(5):
        text = f"a red circle, {number}"
        rest = clip.encode_ahead(text)
        known = rest()
        conditioning = encode(clip, text)
        texts.append([known, clip.source, torch.equal(conditioning[0][0], encode(fresh, text)[0][0])])  # fmt: skip
    found["text_recorded"] = clip.cond_stage_model.engine.graphs.recorded

    # steps: neither the short way nor a first one that was begun changes a number
    usual_short, usual_devices, asked = sampling.shortened, first_step.DEVICES, sampling.ready_again
    ways = {
        "neither": (lambda sampler: sampler, ()),
        "short": (usual_short, ()),
        "begun": (lambda sampler: sampler, usual_devices),
        "both": (usual_short, usual_devices),
    }
    ready: list[bool] = []

    def told(*given):
        ready.append(asked(*given))
        return ready[-1]

    sampling.ready_again = told
    latent = {"samples": torch.zeros(1, 128, 16, 16)}

    def sample(seed, latent=latent):
        return sampling.sample_klein(model, conditioning, latent, seed, 4, 1.0)

    begun, own_begin = {}, Runner.begin

    def counted(*given):
        begun[name] = begun.get(name, 0) + 1
        return own_begin(*given)

    name, Runner.begin = "first", counted
    first = [sample(seed)["samples"] for seed in range(3)]
    results = {}
    for name, (sampling.shortened, first_step.DEVICES) in ways.items():
        results[name] = [sample(seed)["samples"] for seed in range(3)]
    found["same"] = [torch.equal(a, b) for made in results.values() for a, b in zip(made, results["neither"], strict=True)]  # fmt: skip
    found["near"] = max(float((a - b).norm() / b.norm()) for a, b in zip(first, results["neither"], strict=True))  # fmt: skip
    found["begun"] = dict(begun)
    runner = engine_on(model).runner
    found["ready"], found["recorded"] = list(ready), runner.graphs.recorded
    found["why_not"], found["reasons"] = runner.graphs.why_not, sorted(runner.reasons)

    # pictures: decoded before the node is asked for them; nobody has taken those of the other size
    other = {"samples": torch.zeros(1, 128, 16, 20)}
    decodes, own, pictures = [], vae.engine.decode, []
    vae.engine.decode = lambda *given, **named: decodes.append(1) or own(*given, **named)
    for seed in range(6):
        made = sample(seed, other)
        before = len(decodes)
        picture = stock.VAEDecode().decode(vae, made)[0]
        pictures.append([before, len(decodes), torch.equal(picture, vae.decode(made["samples"].clone()))])  # fmt: skip
        decodes.clear()
    found["pictures"] = pictures
out.write_text(json.dumps(found))
