"""Run inside a host's Python path, on a GPU: `vae_gpu_run.py HOST PACK_PARENT OUT`; the VAE engine in bf16 against the host's module in fp32, as JSON."""

import copy
import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import difference  # noqa: E402
from tiny_vae import write_random  # noqa: E402

from ark.patches import vae_engine  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.patches.warmup import settle  # noqa: E402

SIZES = [(1, 16, 16), (2, 9, 13), (1, 32, 20)]
found = {"errors": {}}


def by_host(vae, way, given):
    """The host's own code with the same weights."""
    engine, vae.engine = vae.engine, None
    try:
        return getattr(vae, way)(given)
    finally:
        vae.engine = engine


torch.backends.cudnn.allow_tf32 = False
with torch.inference_mode():
    vae, _ = load_vae(write_random(out.with_name("vae.safetensors")))
    settle()
    found["dtype"], engine = str(vae.vae_dtype), vae.engine
    comfy.model_management.load_models_gpu([vae.patcher])
    model = vae.first_stage_model
    apart = {name: vars(model).pop(name) for name in ("decode", "encode", "ark_masters")}
    exact = copy.deepcopy(model).float()
    vars(model).update(apart)

    def check(name, way, given):
        """Note how far the engine and the host in bf16 are off the host in fp32."""
        device = vae.device
        if way == "decode":
            best = vae.process_output(exact.decode(given.to(device)).float()).movedim(1, -1).cpu()
        else:
            best = exact.encode(vae.process_input(given.to(device)).movedim(-1, 1)).cpu()
        mine, theirs = getattr(vae, way)(given), by_host(vae, way, given)
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert mine.device == theirs.device
        found["errors"][f"{way} {name}"] = [difference(mine, best), difference(theirs, best)]

    for size in SIZES:
        batch, height, width = size
        for turn in range(4):  # the second one is recorded, later ones are replayed
            check(f"{size} {turn}", "decode", torch.randn(batch, 128, height, width))
            check(f"{size} {turn}", "encode", torch.rand(batch, 16 * height, 16 * width, 3))
    found["recorded"], found["why_not"] = engine.graphs.recorded, engine.graphs.why_not
    vae_engine.BAND = 3000
    usual = vae._plans
    vae._plans = lambda *_: iter([(1, True)])
    for way, given in (("decode", torch.randn(1, 128, 16, 24)), ("encode", torch.rand(2, 256, 272, 3))):  # fmt: skip
        check("in bands", way, given)
    vae._plans = usual
    found["pinned"] = vae.decode(torch.randn(1, 128, 16, 16)).is_pinned()
    comfy.model_management.unload_all_models()
    found["forgotten"] = [not engine._records, engine.graphs.recorded]
    check("after an unload", "decode", torch.randn(1, 128, 16, 16))
    tile = torch.randn(1, 128, 20, 20)
    found["tiled"] = difference(vae.decode_tiled(tile, 16, 16, 4), vae.decode(tile))
    found["reasons"] = sorted(engine.reasons)
out.write_text(json.dumps(found))
