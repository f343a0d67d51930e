"""Run inside a host's Python path: `fused_run.py HOST PACK_PARENT OUT`; what the fused engine does to a model, as JSON."""

import json
import logging.handlers
import sys
import types
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN, difference, lora_hook, with_lora, write_fp8  # noqa: E402

from ark.patches import warmup  # noqa: E402
from ark.patches.attention import set_attention  # noqa: E402
from ark.patches.fused import engine_on, remove_fused, set_fused  # noqa: E402
from ark.patches.residency import ResidentPatcher  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.toolkit import igniter  # noqa: E402
from ark.toolkit.fused import graph  # noqa: E402
from ark.toolkit.fused.matrix import Fp8  # noqa: E402
from ark.toolkit.kernels import KERNELS, AttentionKernel  # noqa: E402

found: dict = {"hooks": {}}


def sample(model, size=(4, 5), batch=1, txt_len=32, references=0, cfg=None, hook=None):
    torch.manual_seed(0)
    options = {"pooled_output": None}
    if references:
        options["reference_latents"] = [torch.randn(1, 128, 3 + n, 4) for n in range(references)]
    positive = [[torch.randn(1, txt_len, 192), options]]
    if hook is not None:
        positive = comfy.hooks.set_hooks_for_conditioning(positive, hook)
    latent = {"samples": torch.zeros(batch, 128, *size)}
    guided = {"cfg": cfg, "negative": [[torch.randn(1, txt_len, 192), options]]} if cfg else {}
    return sample_klein(model, positive, latent, 7, 2, 1.0, **guided)["samples"]


def engine_of(model):
    return engine_on(model).runner


with torch.inference_mode():
    model, _ = load_transformer(KLEIN)
    flux = model.model.diffusion_model
    attributes = set(vars(flux))
    expected = sample(model)
    fused, found["report"] = set_fused(model)
    cases = {
        "plain": {},
        "other_size": {"size": (7, 3)},
        "batch": {"batch": 3},
        "long_prompt": {"txt_len": 520},
        "one_reference": {"references": 1},
        "references_and_batch": {"references": 3, "batch": 2},
    }
    found["errors"] = {
        name: difference(sample(fused, **how), sample(model, **how)) for name, how in cases.items()
    }
    found["reasons"] = sorted(engine_of(fused).reasons)

    # attention by one of Ark's kernels
    calls = []
    counting = AttentionKernel(
        "counting",
        (torch.float32,),
        lambda q, k, v: calls.append(1) or KERNELS["math"].attend(q, k, v),
        lambda hw: None,
    )
    KERNELS["counting"] = counting
    attended, _ = set_attention(fused, "counting")
    found["errors"]["own_kernel"] = difference(sample(attended), expected)
    found["kernel_calls"] = len(calls)

    for strength in (1.0, 0.5):
        found["errors"][f"lora_{strength}"] = difference(
            sample(with_lora(fused, strength, 0.05)), sample(with_lora(model, strength, 0.05))
        )
    found["lora_matters"] = difference(sample(with_lora(model, 0.5, 0.05)), expected)
    found["errors"]["lora_removed"] = difference(sample(fused), expected)

    # the same in the hooks of a conditioning, in turns with none
    fp8, _ = set_fused(model, "fp8")
    for name, one in (("host", model), ("fused", fused), ("fp8", fp8)):
        patched = {strength: sample(with_lora(one, strength, 0.05)) for strength in (1.0, 0.5)}
        before, again = sample(one), lora_hook(model, 1.0, 0.05)
        for strength, hook in ((1.0, again), (0.5, lora_hook(model, 0.5, 0.05)), (1.0, again)):
            found["hooks"][f"{name}, {strength}"] = difference(sample(one, hook=hook), patched[strength])  # fmt: skip
            found["hooks"][f"{name}, without {strength}"] = difference(sample(one), before)

    # what it does not know goes to the host
    messages = logging.handlers.MemoryHandler(1000)
    logging.getLogger("ark").addHandler(messages)
    patched = fused.clone()
    patched.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 0
    )
    found["patched_by_others"] = torch.equal(sample(patched), expected)
    sample(patched)
    found["told"] = [r.getMessage() for r in messages.buffer if "own forward" in r.getMessage()]
    foreign = fused.clone()
    foreign.model_options["transformer_options"] = {
        **foreign.model_options.get("transformer_options", {}),
        "optimized_attention_override": lambda func, *a, **k: func(*a, **k),
    }
    found["attention_by_others"] = torch.equal(sample(foreign), expected)

    overflow = AttentionKernel(
        "overflow", (torch.float32,), lambda q, k, v: q * float("nan"), lambda hw: None
    )
    KERNELS["overflow"] = overflow
    guarded, _ = set_fused(set_attention(model, "overflow")[0])
    messages.buffer.clear()
    found["guarded"] = [torch.equal(sample(guarded), expected) for _ in range(2)]
    found["guard_told"] = [
        r.getMessage() for r in messages.buffer if "not finite. The run" in r.getMessage()
    ]

    # memory that runs out once costs a step, twice the prompt
    short = []

    def out_of_memory(q, k, v):
        if short:
            short.pop()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return KERNELS["math"].attend(q, k, v)

    KERNELS["short"] = AttentionKernel("short", (torch.float32,), out_of_memory, lambda hw: None)
    narrow, _ = set_fused(set_attention(model, "short")[0])
    messages.buffer.clear()
    short.append(1)
    found["errors"]["out_of_memory_once"] = difference(sample(narrow), expected)
    found["memory_told"] = [r.getMessage() for r in messages.buffer if "memory" in r.getMessage()]
    short += [1, 1]
    try:
        sample(narrow)
    except torch.cuda.OutOfMemoryError:
        found["out_of_memory_twice"] = "told to the host"
    found["errors"]["after_that"] = difference(sample(narrow), expected)

    # fp8
    low, _ = set_fused(model, "fp8")
    first = sample(low)
    found["fp8_error"] = difference(first, expected)
    found["fp8_repeats"] = torch.equal(sample(low), first)
    found["fp8_matrices"] = sum(isinstance(made, Fp8) for _, made in engine_of(low)._made.values())
    changed = sample(with_lora(low, 1.0, 0.05))
    found["fp8_lora"] = [
        difference(changed, first),
        difference(changed, sample(with_lora(model, 1.0, 0.05))),
    ]
    found["fp8_again"] = torch.equal(sample(low), first)
    comfy.model_management.unload_all_models()
    found["fp8_after_unload"] = len(engine_of(low)._made)
    found["fp8_reloaded"] = torch.equal(sample(low), first)

    # two settings in turns, none disturbs the other
    turns = [sample(m) for m in (fused, low, model, fused, low, model)]
    found["turns"] = [torch.equal(a, b) for a, b in zip(turns[:3], turns[3:], strict=True)]

    file8, _ = load_transformer(write_fp8(out.with_name("fp8.safetensors")))
    reference = sample(file8)
    engine8, _ = set_fused(file8)
    found["fp8_file"] = [difference(sample(engine8), reference), difference(reference, expected)]
    found["fp8_file_reasons"] = sorted(engine_of(engine8).reasons)

    found["removed_identical"] = torch.equal(sample(remove_fused(fused.clone())), expected)
    found["source_identical"] = torch.equal(sample(model), expected)
    found["attributes_unchanged"] = set(vars(flux)) == attributes
    comfy.model_management.unload_all_models()

    # fp8 copies take the weights' place, until ComfyUI's own forward needs them
    ResidentPatcher.fast_devices, igniter.IN_MEMORY = ("cuda", "cpu"), 0
    sent, _ = load_transformer(KLEIN)
    masters, (low, _) = sent.masters, set_fused(sent, "fp8")
    away = found["released"] = {}

    def note(name, same):
        own = {
            k: w for k, w in sent.model.named_parameters() if k not in masters.at_home(sent.model)
        }
        flat = sum(w.untyped_storage().nbytes() > w.nbytes for w in own.values())
        away[name] = [same, len(masters.released), len(own), flat]

    note("fp8", torch.equal(sample(low), first))
    made = engine_on(low)._made
    note("fp8_again", torch.equal(sample(low), first))
    found["made_once"] = made is engine_on(low)._made
    note("host", torch.equal(sample(sent), expected))
    note("fp8_after_host", torch.equal(sample(low), first))
    note("lora", torch.equal(sample(with_lora(low, 1.0, 0.05)), changed))
    note("lora_removed", torch.equal(sample(low), first))

    def half(model, **how):
        """A run whose last step is the host's own."""
        calls, model = [], model.clone()

        def apply(apply_model, given):
            calls.append(1)
            options = dict(given["c"]["transformer_options"])
            options |= {"patches": {"of_another_node": [print]}} if len(calls) > 1 else {}
            return apply_model(given["input"], given["timestep"], **{**given["c"], "transformer_options": options})  # fmt: skip

        model.set_model_unet_function_wrapper(apply)
        return sample(model, **how)

    hook = lora_hook(sent, 1.0, 0.05)
    note("hook", torch.equal(sample(low, hook=hook), changed))
    note("hook_removed", torch.equal(sample(low), first))
    expected_half = half(with_lora(low, 1.0, 0.05))
    found["half"] = difference(half(low, hook=hook), expected_half), difference(expected_half, changed)  # fmt: skip
    note("hook_and_host", torch.equal(sample(low), first))
    freed = low.partially_unload(torch.device("cpu"), 1000)
    note("partly_unloaded", freed >= 1000)
    note("after_that", torch.equal(sample(low), first))
    comfy.model_management.unload_all_models()
    note("unloaded", len(masters.at_home(sent.model)) == len(masters.homes))
    note("reloaded", torch.equal(sample(low), first))
    note("host_at_last", torch.equal(sample(sent), expected))
    found["no_forward_left"] = "forward_orig" not in vars(sent.model.diffusion_model)
    comfy.model_management.unload_all_models()

    # a run whose memory is in a recording is not loaded again, and gives the same; any other is
    again, _ = set_fused(sent)
    how = {"usual": {}, "size": {"size": (7, 3)}, "reference": {"size": (7, 3), "references": 1}}
    how |= {"cfg 1": {"cfg": 1.0}, "cfg 2": {"cfg": 2.0}}
    others = {name: sample(sent, **given) for name, given in how.items()}
    changed_fully, lora = sample(with_lora(sent, 1.0, 0.05)), with_lora(again, 1.0, 0.05)
    found["stayed_lora_matters"] = difference(changed_fully, expected)
    loads, load = [], comfy.model_management.load_models_gpu

    def counted(*args, **kwargs):
        loads.append(1)
        return load(*args, **kwargs)

    comfy.model_management.load_models_gpu, graph.trim = counted, lambda: None  # which asks a GPU
    stayed = found["stayed"] = []

    def run(name, of=again):
        loads.clear()
        wanted = others[name] if of is again else changed_fully
        stayed.append([difference(sample(of, **how[name]), wanted), len(loads)])

    def record():
        stream = types.SimpleNamespace(synchronize=lambda: None)
        made_up = types.SimpleNamespace(stream=stream)  # on a CPU nothing is
        engine_on(again).runner.graphs._recorded["as if"] = made_up

    run("usual"), run("usual")
    made = engine_on(again)._made
    record()
    for name in ("usual", "size", "size", "reference", "reference", "usual", "usual"):
        run(name)
    for name in ("cfg 1", "cfg 1", "cfg 2", "cfg 2"):  # the same conditionings, but two passes
        run(name)
    found["record_kept"] = made is not None and made is engine_on(again)._made
    run("usual", lora), run("usual", lora), record(), run("usual", lora), run("usual")
    record(), run("usual")
    comfy.model_management.unload_all_models()
    run("usual")
    comfy.model_management.load_models_gpu = load

    # one block of each kind runs in the background, once for a kind of model
    warmup.DEVICES = ("cpu",)
    messages.buffer.clear()
    for _ in range(2):
        set_fused(sent, "fp8")
        warmup.settle()
    found["warmed"] = sorted(part for part, *_ in warmup._seen)
    found["warm_up_warnings"] = [
        r.getMessage() for r in messages.buffer if "warmed" in r.getMessage()
    ]
out.write_text(json.dumps(found))
