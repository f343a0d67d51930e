"""Run inside a host's Python path: `compile_run.py HOST PACK_PARENT OUT [short]`; what compiling a model's blocks does, as JSON.

A second, short run with the same cache folder finds what the first one compiled.
"""

import json
import logging.handlers
import sys
import time
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
short = sys.argv[4:] == ["short"]
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_management  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN, difference, with_lora, write_fp8  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from ark.patches.attention import set_attention  # noqa: E402
from ark.patches.compile import set_compile  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.toolkit.errors import InputError  # noqa: E402
from ark.toolkit.kernels import KERNELS, AttentionKernel  # noqa: E402

found = {}


def sample(model, size=4, seed=7):
    torch.manual_seed(0)
    positive = [[torch.randn(1, 32, 192), {"pooled_output": None}]]
    latent = {"samples": torch.zeros(1, 128, size, size + 1)}
    return sample_klein(model, positive, latent, seed, 2, 1.0)["samples"]


with torch.inference_mode():
    model, _ = load_transformer(KLEIN)
    tree = [name for name, _ in model.model.named_modules()]
    expected = sample(model)
    attended, _ = set_attention(model, "math")
    compiled, report, compiler = set_compile(attended, "default")
    found["report"] = report
    start = time.perf_counter()
    found["error"] = difference(sample(compiled), expected)
    found["seconds"] = time.perf_counter() - start
    found["graphs"] = [compiler.graphs, compiler.found, counters["stats"]["unique_graphs"]]
    found["kept"] = [len(list(compiler.cache.glob(kind))) for kind in ("*.bin", "*.trace")]

    def check(name, this, reference):
        before = compiler.graphs
        found[name] = {"error": difference(this(), reference()), "graphs": compiler.graphs - before}

    check("another_seed", lambda: sample(compiled, seed=8), lambda: sample(model, seed=8))
    for size in (5, 6, 8):
        check(f"size_{size}", lambda s=size: sample(compiled, s), lambda s=size: sample(model, s))
    for strength in (1.0, 0.5):
        check(
            f"lora_{strength}",
            lambda s=strength: sample(with_lora(compiled, s)),
            lambda s=strength: sample(with_lora(model, s)),
        )
    if short:
        blocks = model.model.diffusion_model.single_blocks[0]
        blocks.forward = blocks.forward  # as a node does that puts its own there
        found["replaced"] = [difference(sample(compiled), expected), compiler.graphs]
        del blocks.forward
        quantised, _ = load_transformer(write_fp8(out.with_name("fp8.safetensors")))
        try:
            fast, _, again = set_compile(set_attention(quantised, "math")[0], "default")
            found["fp8"] = [difference(sample(fast), sample(quantised)), again.graphs, again.found]
        except InputError:
            pass
        out.write_text(json.dumps(found))
        sys.exit()
    again, _, same = set_compile(set_attention(model, "math")[0], "default")
    found["same_compiler"] = same is compiler
    check("node_run_again", lambda: sample(again), lambda: expected)

    calls = []
    patched = compiled.clone()
    patched.set_model_patch(
        lambda q, k, v, **kwargs: calls.append(1) or {"q": q, "k": k, "v": v}, "attn1_patch"
    )
    try:
        check("patched_by_others", lambda: sample(patched), lambda: expected)
        found["patch_called"] = len(calls)
    except TypeError:  # the old host calls such patches in another way
        found["patched_by_others"] = found["patch_called"] = None

    # a kernel that overflows: the run is repeated on the host's attention, once, and the user is told
    ran = []

    def overflow(q, k, v):
        ran.append(1)
        return q * float("nan")

    KERNELS["overflow"] = AttentionKernel("overflow", (torch.float32,), overflow, lambda hw: None)
    messages = logging.handlers.MemoryHandler(1000)
    logging.getLogger("ark").addHandler(messages)
    overflowing, _ = set_attention(model, "overflow")
    found["guarded"] = [torch.equal(sample(overflowing), expected) for _ in range(2)]
    found["kernel_ran"] = len(ran)
    found["told"] = [r.getMessage() for r in messages.buffer if r.levelno == logging.WARNING]
    unguarded, _ = set_attention(overflowing, "none")
    found["none_cancels"] = torch.equal(sample(unguarded), expected) and len(ran)
    both, _, _ = set_compile(overflowing, "default")
    found["guarded_compiled"] = torch.equal(
        sample(both), expected
    )  # by the host's code, uncompiled

    # fp8 weights
    fp8 = write_fp8(out.with_name("fp8.safetensors"))
    quantised, _ = load_transformer(fp8)
    reference = sample(quantised)
    found["fp8_matters"] = difference(reference, expected)
    try:
        fast, _, fp8_compiler = set_compile(set_attention(quantised, "math")[0], "default")
        found["fp8"] = [difference(sample(fast), reference)]
        comfy.model_management.unload_all_models()
        found["fp8"] += [difference(sample(fast), reference), fp8_compiler.graphs]
    except InputError as error:
        found["fp8_refused"] = str(error)

    off, _, _ = set_compile(compiled, "off")
    off, _ = set_attention(off, "none")
    found["off_identical"] = torch.equal(sample(off), expected)
    found["source_identical"] = torch.equal(sample(model), expected)
    found["tree_unchanged"] = [name for name, _ in model.model.named_modules()] == tree
    refused = []
    for mode in ("reduce-overhead", "fastest"):
        try:
            set_compile(model, mode)
        except Exception as error:
            refused.append(str(error))
    found["refused"] = refused
    comfy.model_management.unload_all_models()
out.write_text(json.dumps(found))
