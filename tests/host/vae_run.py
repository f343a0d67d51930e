"""Run inside a host's Python path: `vae_run.py HOST PACK_PARENT OUT`; the VAE engine against the host's own modules, as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import difference  # noqa: E402
from tiny_vae import write_random  # noqa: E402

from ark.patches import fast_vae, vae_engine  # noqa: E402
from ark.patches.fast_vae import FastVAE  # noqa: E402
from ark.patches.references import add_references  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.toolkit.embedded import ASSETS  # noqa: E402

EMBEDDED = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"
found = {"errors": {}}


def engine_on(vae, on):
    """Whether the engine runs on a CPU, in the dtype of this VAE."""
    vae_engine.DEVICES, vae_engine.DTYPES = (("cpu",) if on else ("cuda",)), (vae.vae_dtype,)


def both(vae, work):
    """What the engine gives and what the host gives."""
    results = []
    for on in (True, False):
        engine_on(vae, on)
        before = len(vae.engine.reasons)
        results.append(work())
        assert not on or len(vae.engine.reasons) == before, vae.engine.reasons
    return results


def compare(name, vae, work):
    """Note how far the engine is off."""
    mine, theirs = both(vae, work)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (mine.shape, theirs.shape)
    found["errors"][name] = difference(mine, theirs)
    return theirs


with torch.inference_mode():
    vae, _ = load_vae(EMBEDDED)
    latents = torch.randn(1, 128, 3, 5)
    result = vae.decode(latents)
    found["host_ran"] = torch.equal(result, comfy.sd.VAE.decode(vae, latents))
    found["reasons"] = sorted(vae.engine.reasons)
    compare("embedded_decode", vae, lambda: vae.decode(latents))
    compare("embedded_encode", vae, lambda: vae.encode(result))

    random, _ = load_vae(write_random(out.with_name("vae.safetensors")))
    assert isinstance(random, FastVAE) and isinstance(random, comfy.sd.VAE)
    for batch, height, width in ((3, 2, 5), (1, 1, 1)):
        z = torch.randn(batch, 128, height, width)
        picture = compare(f"decode {z.shape}", random, lambda z=z: random.decode(z))
        compare(f"encode {z.shape}", random, lambda p=picture: random.encode(p))
    z = torch.randn(2, 128, 3, 4)
    for choice in ({"band": 200}, {"band": 500, "fold": False, "attention": "sdpa"}):
        random.engine.choices = dataclasses.replace(vae_engine.USUAL, **choice)
        picture = compare(f"decode {choice}", random, lambda: random.decode(z))
        compare(f"encode {choice}", random, lambda p=picture: random.encode(p))
    random.engine.choices = vae_engine.USUAL
    comfy.model_management.unload_all_models()  # the record goes with the weights
    found["forgotten"] = not random.engine._records
    compare("after an unload", random, lambda: random.decode(z))

    # the stock nodes: an odd size, four channels, tiles, a mask
    odd = torch.rand(1, 41, 70, 3)
    mask = torch.zeros(1, 41, 70)
    mask[:, 10:30, 20:50] = 1
    latent = compare("VAEEncode", random, lambda: stock.VAEEncode().encode(random, odd)[0]["samples"])  # fmt: skip
    compare("VAEEncodeTiled", random, lambda: stock.VAEEncodeTiled().encode(random, odd, 64, 16)[0]["samples"])  # fmt: skip
    compare("VAEEncodeForInpaint", random, lambda: stock.VAEEncodeForInpaint().encode(random, odd, mask)[0]["samples"])  # fmt: skip
    compare("VAEDecode", random, lambda: stock.VAEDecode().decode(random, {"samples": latent})[0])
    compare("VAEDecodeTiled", random, lambda: stock.VAEDecodeTiled().decode(random, {"samples": z}, 64, 16)[0])  # fmt: skip
    compare("references", random, lambda: add_references([[z, {}]], random, [odd, odd], 1.0)[0][0][1]["reference_latents"][1])  # fmt: skip

    # where memory is short: one picture at a time, then bands, then the host's tiles, which show
    whole, usual = both(random, lambda: random.decode(z))[1], random.engine.decode
    for name, fits in {"one by one": 1, "in bands": 0}.items():

        def short(record, x, band=False, lasting=True, fits=fits):
            if len(x) > fits and not band:
                raise torch.cuda.OutOfMemoryError("it is full")
            return usual(record, x, band, lasting)

        random.engine.decode = short
        vae_engine.BAND = 200
        engine_on(random, True)
        found["errors"][name] = difference(random.decode(z), whole)

    def full(record, x, band=False, lasting=True):
        if lasting or len(x) > 1:  # tiles come one by one
            raise torch.cuda.OutOfMemoryError("it is full")
        return usual(record, x, band, lasting)

    random.engine.decode = full
    engine_on(random, True)
    found["errors"]["in the host's tiles"] = difference(random.decode(z), whole)
    random.engine.decode = usual
    free = comfy.model_management.get_free_memory
    found["plans"] = []
    for megabytes in (100_000, 8000, 600):
        comfy.model_management.get_free_memory = lambda *_, mb=megabytes, **__: mb << 20
        found["plans"].append(list(random._plans("decode", 4, 2048, 2048)))
    found["plans"].append(list(random._plans("decode", 2, 8192, 8192)))
    comfy.model_management.get_free_memory = free

    # what is decoded as soon as a sampler has made it, as on a GPU from a recording
    engine_on(random, True)
    decodes, ahead = [], []
    found["ahead"] = ahead
    random.engine.decode = lambda *given, **named: decodes.append(1) or usual(*given, **named)

    def sampled(recorded=True, changed=lambda z: None, vae=random):
        """The difference, and decodes before the node and all in all."""
        random.engine.is_recorded = lambda *given: recorded
        decodes.clear()
        fast_vae.latents.begin("z", z)
        with torch.inference_mode(False):
            given = z.clone()
        changed(fast_vae.latents.made(given))
        before, wanted = len(decodes), given.clone()
        pictures = stock.VAEDecode().decode(vae, {"samples": given})[0]
        count = len(decodes)
        ahead.append([difference(pictures, vae.decode(wanted)), before, count])

    sampled(), sampled(), sampled(recorded=False)
    hooks, conv = [], random.first_stage_model.decoder.conv_in
    sampled(changed=lambda z: hooks.append(conv.register_forward_hook(lambda *given: 2 * given[2])))
    hooks.pop().remove()
    sampled(changed=lambda z: z.mul_(0.9)), sampled(), sampled(vae=vae)
    random.engine.decode = usual
    del random.engine.is_recorded

    # other people's doing: the host runs, and says why
    def refused(change, undo):
        engine_on(random, True)
        random.engine.reasons.clear()
        change()
        result = random.decode(z)
        undo()
        return [sorted(random.engine.reasons), difference(result, whole)]

    model = random.first_stage_model
    layer, decoder = model.decoder.mid.attn_1, model.decoder
    handles = []
    found["refused"] = {
        "hook": refused(
            lambda: handles.append(layer.register_forward_hook(lambda m, i, o: 2 * o)),
            lambda: handles.pop().remove(),
        ),
        "decoder": refused(
            lambda: setattr(model, "decoder", torch.nn.Sequential(decoder)),
            lambda: setattr(model, "decoder", decoder),
        ),
        "method": refused(
            lambda: handles.append(vars(model).pop("decode")),
            lambda: setattr(model, "decode", handles.pop()),
        ),
    }
    compare("afterwards", random, lambda: random.decode(z))

    def complaint(channels):
        """What somebody is told whose picture has other colours than the encoder."""
        try:
            model.encode(torch.rand(1, channels, 32, 32))
        except RuntimeError as error:
            return str(error)

    random.engine.encode = None  # which does not get to see them
    found["colours"] = [both(random, lambda c=c: complaint(c)) for c in (1, 4)]
    del random.engine.encode
    random.detach()
    engine_on(random, True)
    found["detached"] = [torch.equal(random.decode(z), whole), sorted(vars(model).keys() & {"decode", "encode"})]  # fmt: skip

    # in bf16 it is no further off than the host in bf16
    usual_dtype = comfy.model_management.vae_dtype
    comfy.model_management.vae_dtype = lambda *_, **__: torch.bfloat16
    half, _ = load_vae(out.with_name("vae.safetensors"))
    comfy.model_management.vae_dtype = usual_dtype
    exact = comfy.sd.VAE.encode(random, odd)
    found["bf16"] = {
        "decode": [difference(one, whole) for one in both(half, lambda: half.decode(z))],
        "encode": [difference(one, exact) for one in both(half, lambda: half.encode(odd))],
    }
out.write_text(json.dumps(found))
