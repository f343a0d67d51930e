"""Run inside a host's Python path: `euler_run.py HOST PACK_PARENT OUT`; Ark's Euler steps against the host's, as JSON."""

import contextlib
import functools
import io
import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.patcher_extension  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN, with_lora  # noqa: E402

from ark.patches import euler, sampling  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402

found: dict = {"short": {}, "hosts": {}}
own, ways = euler._unusual, []


def unusual(*given):
    reason = own(*given)
    ways.append(reason is None)
    return reason


euler._unusual = unusual
sampling.stay = lambda guider: None  # nothing lies on a device here
generator = torch.Generator().manual_seed(5)


def drawn(*shape):
    return torch.randn(shape, generator=generator)


def conditioning(references=0, **options):
    if references:
        options["reference_latents"] = [drawn(1, 128, 3 + n, 4) for n in range(references)]
    return [[drawn(1, 32, 192), {"pooled_output": None, **options}]]


def compare(kind, name, model, positive, batch=1, steps=4, denoise=1.0, image=False, latent=None, console=False, **more):  # fmt: skip
    """Whether both ways give the same numbers, also on the way; and whether the short one was taken."""
    samples = drawn(batch, 128, 4, 5) if image else torch.zeros(batch, 128, 4, 5)
    latent, results = {"samples": samples, **(latent or {})}, []
    for short in (False, True):
        sampling.ready_again = lambda *given, short=short: short
        seen, shown = [], io.StringIO()
        ways.clear()
        with contextlib.redirect_stderr(shown):
            made = sampling.sample_klein(model, positive, latent, 3, steps, denoise, watch=lambda *step, seen=seen: seen.append(step), **more)  # fmt: skip
        results.append((made["samples"], seen, f"{len(seen)}/{len(seen)}" in shown.getvalue()))
    (a, before, told), (b, after, told_too) = results
    same = [torch.equal(a, b), len(before) == len(after), told == told_too == True]  # noqa: E712
    for (i, x0, x, n), (j, y0, y, m) in zip(before, after, strict=True):
        same.append((i, n) == (j, m) and torch.equal(x0, y0) and torch.equal(x, y))
    found[kind][name] = [all(same), *ways]


def with_wrapper(model, kind):
    changed = model.clone()
    changed.add_wrapper_with_key(kind, "test", lambda executor, *args, **named: executor(*args, **named))  # fmt: skip
    return changed


with torch.inference_mode():
    model, _ = load_transformer(KLEIN)
    compare("short", "text", model, conditioning())
    compare("short", "one step", model, conditioning(), steps=1)
    compare("short", "batch", model, conditioning(), batch=3)
    compare(
        "short",
        "a batch of prompts",
        model,
        [[drawn(2, 32, 192), {"pooled_output": None}]],
        batch=2,
    )
    compare("short", "references", model, conditioning(2))
    compare("short", "image", model, conditioning(), image=True, denoise=0.5)
    compare("short", "sigmas", model, conditioning(), sigmas=torch.tensor([0.9, 0.7, 0.2, 0.0]))
    compare("short", "unfinished", model, conditioning(), sigmas=torch.tensor([0.9, 0.7, 0.2]))
    compare("short", "cfg 1", model, conditioning(), negative=conditioning(), cfg=1.0)
    compare("short", "LoRA", with_lora(model, 1.0, 0.05), conditioning())
    compare("short", "inside the model", with_wrapper(model, "apply_model"), conditioning())

    changed = model.clone()
    changed.set_model_unet_function_wrapper(lambda run, given: run(given["input"], given["timestep"], **given["c"]))  # fmt: skip
    compare("hosts", "around the model", changed, conditioning())
    changed = model.clone()
    changed.set_model_sampler_cfg_function(lambda given: given["cond"] * 0.9)
    compare("hosts", "cfg by another node", changed, conditioning())
    for kind in euler.BETWEEN:
        compare("hosts", kind, with_wrapper(model, kind), conditioning())
    changed = model.clone()
    changed.add_callback_with_key(euler.EACH_STEP, "test", lambda *given: None)
    compare("hosts", "before each step", changed, conditioning())
    compare("hosts", "cfg 2", model, conditioning(), negative=conditioning(), cfg=2.0)
    compare("hosts", "two prompts", model, conditioning() + conditioning())
    compare("hosts", "part of the steps", model, conditioning(start_percent=0.0, end_percent=0.5))
    compare("hosts", "strength", model, conditioning(strength=0.5))
    compare("hosts", "area", model, conditioning(area=(2, 2, 0, 0)))
    calc = comfy.samplers.calc_cond_batch
    comfy.samplers.calc_cond_batch = lambda *given: calc(*given)
    compare("hosts", "another pack's own", model, conditioning())
    comfy.samplers.calc_cond_batch = calc
    for owner, name in ((comfy.samplers, "_calc_cond_batch"), (comfy.samplers.KSAMPLER, "sample")):
        hosts = getattr(owner, name)
        around = functools.wraps(hosts)(lambda *given, hosts=hosts, **named: hosts(*given, **named))
        setattr(owner, name, around)  # which says that it is the host's
        compare("hosts", f"around {name}", model, conditioning())
        setattr(owner, name, hosts)
    ways.clear()
    compare("hosts", "sigmas in double", model, conditioning(), sigmas=torch.tensor([0.9, 0.7, 0.2, 0.0]).double())  # fmt: skip
    double = found["hosts"].pop("sigmas in double")
    found["double"] = double[0]
    ways.clear()
    compare("hosts", "mask", model, conditioning(), latent={"noise_mask": torch.ones(1, 64, 80)})
out.write_text(json.dumps(found))
