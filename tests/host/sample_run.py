"""Run inside a host's Python path: `sample_run.py HOST PACK_PARENT FOLDER`; prints what Ark's sampling and stock nodes gave.

Everything on CPU in fp32, with the embedded text encoder and VAE and a small random transformer, written to FOLDER. The
stock side is the host's own nodes, on the same transformer and on one that the host's own classes built. Prints one
JSON: `{case: {...}}`.
"""

import json
import sys
from pathlib import Path

host, pack_parent, folder = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_extras import nodes_custom_sampler as custom  # noqa: E402
from comfy_extras.nodes_edit_model import ReferenceLatent  # noqa: E402
from comfy_extras.nodes_flux import Flux2Scheduler  # noqa: E402
from comfy_extras.nodes_post_processing import ImageScaleToTotalPixels  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import nodes as stock  # noqa: E402

sys.path.append(str(pack_parent))
from ark.nodes.references import ArkReferenceImages  # noqa: E402
from ark.nodes.sample import ArkSampler4Step  # noqa: E402
from ark.nodes.schedule import ArkScheduler  # noqa: E402
from ark.patches import noise as drawing  # noqa: E402
from ark.patches import sampling  # noqa: E402
from ark.patches.text_encoder import load_text_encoder  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.patches.vae import load_vae  # noqa: E402
from ark.toolkit.embedded import ASSETS, embedded_text_encoder  # noqa: E402
from ark.toolkit.errors import InputError  # noqa: E402

sys.path.insert(1, str(Path(__file__).parent))
from small_klein import lora_of, write_small_klein  # noqa: E402

torch.set_num_threads(1)
KLEIN = write_small_klein(folder / "small_klein.safetensors")
SEED = 7
# sampled a second time with the transformer that the host's own classes built
INDEPENDENT = {"text, 4 steps", "cfg", "LoRA", "image, denoise 0.5", "noise mask", "2 reference(s)"}
results, rows = {}, []


def stock_transformer():
    """The host's own class with the file's weights, as its UNETLoader would build it if it knew the head count."""
    state_dict = {name: tensor.float() for name, tensor in load_file(KLEIN).items()}
    config = comfy.model_detection.detect_unet_config(state_dict, "")
    config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
    model_config = comfy.model_detection.model_config_from_unet_config(config, state_dict)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(state_dict, "")
    model.load_model_weights(dict(state_dict), "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def counted(model):
    """A clone that writes down how many pictures each call of the model had."""

    def count(executor, x, *arguments, **options):
        rows.append(len(x))
        return executor(x, *arguments, **options)

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", count)
    return clone


def by_stock(model, latent, sigmas, positive, negative=None, cfg=1.0):
    """SamplerCustomAdvanced with the nodes that Klein's official graph has."""
    if negative is None:
        guider = custom.BasicGuider.execute(model, positive).result[0]
    else:
        guider = custom.CFGGuider.execute(model, positive, negative, cfg).result[0]
    noise = custom.RandomNoise.execute(SEED).result[0]
    euler = custom.KSamplerSelect.execute("euler").result[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, euler, sigmas, latent).result[0]


def compare(
    name, latent, positive, expected_levels, steps=4, denoise=1.0, theirs_positive=None, **options
):
    """Sample both ways and write down how far they are apart, and which calls Ark's model had."""
    rows.clear()
    output = ArkSampler4Step.execute(ours, positive, latent, SEED, steps, denoise, **options)
    made = output.result[0]
    calls = list(rows)
    graph = (
        latent,
        expected_levels,
        theirs_positive or positive,
        options.get("negative"),
        options.get("cfg", 1.0),
    )
    expected = by_stock(ours, *graph)
    results[name] = {
        "equal": torch.equal(made["samples"], expected["samples"]),
        "rows": calls,
        "std": float(made["samples"].std()),
        "kept": sorted(made) == sorted(expected),
    }
    if name in INDEPENDENT:
        independent = by_stock(theirs, *graph)["samples"]
        results[name]["error"] = float((made["samples"] - independent).norm() / independent.norm())
    return made["samples"]


def levels(latent, steps):
    """Flux2Scheduler's sigmas for a latent."""
    down, across = latent["samples"].shape[-2:]
    return Flux2Scheduler.execute(steps, across * 16, down * 16).result[0]


def empty(width, height, batch=1):
    return {"samples": torch.zeros(batch, 128, height // 16, width // 16)}


def picture(width, height, channels=3):
    generator = torch.Generator().manual_seed(width)
    coarse = torch.rand(1, channels, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)


def referenced(conditioning, *images):
    """The stock way: scaled to a megapixel where larger, encoded, one ReferenceLatent each."""
    for image in images:
        if image.shape[1] * image.shape[2] > 1024 * 1024:
            image = ImageScaleToTotalPixels.execute(
                image, "lanczos", 1.0, *[1] * steps_of_scale
            ).result[0]
        latent = stock.VAEEncode().encode(vae, image)[0]
        conditioning = ReferenceLatent.execute(conditioning, latent).result[0]
    return conditioning


def refused(call):
    """The text of an InputError."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "nothing was refused"


steps_of_scale = sum(
    entry.id == "resolution_steps" for entry in ImageScaleToTotalPixels.define_schema().inputs
)
with torch.inference_mode():
    clip, _ = load_text_encoder(embedded_text_encoder())
    vae, _ = load_vae(ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors")
    ours, theirs = counted(load_transformer(KLEIN)[0]), stock_transformer()

    def encode(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    positive, negative = encode("a large red circle on a white background"), encode("a blue star")
    small, wide = empty(128, 128), empty(192, 128)

    for steps in (1, 4, 50):
        compare(f"text, {steps} steps", small, positive, levels(small, steps), steps)
    compare("another size", wide, positive, levels(wide, 4))
    compare("cfg", small, positive, levels(small, 4), negative=negative, cfg=3.5)
    compare("cfg of 1", small, positive, levels(small, 4), negative=negative)
    compare("batch", empty(128, 128, 3), positive, levels(small, 4))
    one_of_batch = stock.LatentFromBatch().frombatch(empty(128, 128, 3), 2, 1)[0]
    single = compare("one of a batch", one_of_batch, positive, levels(small, 4))
    batch = ArkSampler4Step.execute(ours, positive, empty(128, 128, 3), SEED, 4, 1.0).result[0]
    results["third of the batch alone"] = float((batch["samples"][2:] - single).abs().max())
    given = levels(small, 6)
    compare("sigmas given", small, positive, given, sigmas=given, steps=1, denoise=0.3)

    unpatched = ours, theirs
    ours, theirs = (
        comfy.sd.load_lora_for_models(model, None, lora_of(), 0.8, 0)[0] for model in unpatched
    )
    patched = compare("LoRA", small, positive, levels(small, 4))
    ours, theirs = unpatched
    plain = compare("after the LoRA", small, positive, levels(small, 4))
    results["what the LoRA does"] = float((patched - plain).norm() / plain.norm())

    encoded = stock.VAEEncode().encode(vae, picture(128, 128))[0]
    for denoise, total in ((0.5, 8), (0.8, 5)):
        tail = custom.SplitSigmasDenoise.execute(levels(encoded, total), 4 / total).result[1]
        compare(f"image, denoise {denoise}", encoded, positive, tail, denoise=denoise)
    mask = torch.zeros(1, 100, 90)
    mask[:, 20:70, 30:60] = 1
    masked = stock.SetLatentNoiseMask().set_mask(encoded, mask)[0]
    painted = compare("noise mask", masked, positive, levels(masked, 4))
    results["unmasked corner"] = float((painted - encoded["samples"])[..., 0, 0].abs().max())
    inpaint = stock.InpaintModelConditioning().encode(
        positive, negative, picture(128, 128), vae, mask
    )
    compare("inpaint conditioning", inpaint[2], inpaint[0], levels(masked, 4))
    for_inpaint = stock.VAEEncodeForInpaint().encode(vae, picture(128, 128), mask)[0]
    compare("encoded for inpainting", for_inpaint, positive, levels(masked, 4))
    hidden = stock.SetLatentNoiseMask().set_mask(encoded, torch.zeros(64, 64))[0]
    kept = compare("empty mask", hidden, positive, levels(hidden, 4))
    results["picture under an empty mask"] = float((kept - encoded["samples"]).abs().max())

    sizes = [(128, 128), (141, 95), (64, 200), (96, 96), (80, 80)]
    pictures = [picture(*size) for size in sizes]
    chained = referenced(positive, *pictures)
    compare("five references by stock nodes", small, chained, levels(small, 4))
    both = referenced(positive, picture(128, 128)), referenced(negative, picture(128, 128))
    compare("references and cfg", small, both[0], levels(small, 4), negative=both[1], cfg=2.0)
    for count in (1, 2, 4):
        made, latent = ArkReferenceImages.execute(positive, vae, *pictures[:count]).result
        theirs_positive = referenced(positive, *pictures[:count])
        compare(
            f"{count} reference(s)",
            latent,
            made,
            levels(latent, 4),
            theirs_positive=theirs_positive,
        )
    results["size of the empty latent"] = list(latent["samples"].shape)
    large = picture(1411, 907)
    made, latent = ArkReferenceImages.execute(positive, vae, large).result
    expected = referenced(positive, large)[0][1]["reference_latents"][0]
    found = made[0][1]["reference_latents"][0]
    results["large reference"] = {
        "shape": list(found.shape),
        "error": float((found - expected).abs().max()) if found.shape == expected.shape else None,
    }
    made, _ = ArkReferenceImages.execute(positive, vae, picture(128, 128, 4)).result
    results["transparent reference"] = list(made[0][1]["reference_latents"][0].shape)
    made, _ = ArkReferenceImages.execute(
        positive, vae, torch.cat([pictures[0]] * 2), pictures[1]
    ).result
    results["batch of references"] = [list(one.shape) for one in made[0][1]["reference_latents"]]

    sigmas = ArkScheduler.execute(small, 4, 0.5).result[0]
    stock_tail = custom.SplitSigmasDenoise.execute(levels(small, 8), 0.5).result[1]
    results["scheduler"] = {
        "error": float((sigmas - stock_tail).abs().max()),
        "steps": len(sigmas) - 1,
    }

    def sample(latent=small, conditioning=positive, **options):
        return lambda: ArkSampler4Step.execute(ours, conditioning, latent, SEED, 4, 1.0, **options)

    def masked_by(shape, value=1.0):
        return sample({**encoded, "noise_mask": torch.full(shape, value)})

    narrow = [[positive[0][0][..., :100], positive[0][1]]]
    foreign = ReferenceLatent.execute(positive, {"samples": torch.zeros(1, 16, 8, 8)}).result[0]
    results["refused"] = {
        "cfg alone": refused(sample(cfg=2.0)),
        "negative of another encoder": refused(sample(negative=narrow, cfg=2.0)),
        "reference of another VAE": refused(sample(conditioning=foreign)),
        "mask without pixels": refused(masked_by((1, 0, 4))),
        "mask of colours": refused(masked_by((1, 3, 8, 8))),
        "mask of no dimension": refused(masked_by((8,))),
        "mask of nan": refused(masked_by((1, 8, 8), float("nan"))),
        "one sigma": refused(sample(sigmas=torch.zeros(1))),
        "sigmas of another model": refused(sample(sigmas=torch.tensor([14.6, 3.0, 0.0]))),
        "sigmas of nan": refused(sample(sigmas=torch.tensor([1.0, float("nan"), 0.0]))),
        "five references": refused(lambda: ArkReferenceImages.execute(chained, vae, pictures[0])),
        "tiny reference": refused(
            lambda: ArkReferenceImages.execute(positive, vae, picture(9, 300))
        ),
        "scheduler": refused(
            lambda: ArkScheduler.execute({"samples": torch.zeros(1, 4, 8, 8)}, 4, 1.0)
        ),
    }

    seen = []

    def look(executor, noise, *arguments, **options):
        seen.append(noise.clone())
        return executor(noise, *arguments, **options)

    watched = ours.clone()
    watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "look", look)
    plain, again = (ArkSampler4Step.execute(m, chained, empty(64, 64), SEED, 1, 1.0)[0] for m in (ours, watched))  # fmt: skip
    expected = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(SEED))
    results["noise that another node sees"] = [torch.equal(seen[0], expected), torch.equal(plain["samples"], again["samples"])]  # fmt: skip

    # what draws numbers after a run finds the generators as the host leaves them
    def drawn_after(run):
        torch.manual_seed(0)
        result = run()
        drawing.settle()
        return result, torch.rand(3)

    latent = empty(64, 64)["samples"]
    noise, after = drawn_after(lambda: comfy.sample.prepare_noise(latent, SEED))
    _, ours_after = drawn_after(lambda: ArkSampler4Step.execute(ours, chained, empty(64, 64), SEED, 1, 1.0))  # fmt: skip
    results["numbers drawn after it"] = torch.equal(after, ours_after)
    own, asked = comfy.sample.prepare_noise, []
    comfy.sample.prepare_noise = lambda *given: asked.append(given) or own(*given)
    replaced = ArkSampler4Step.execute(ours, chained, empty(64, 64), SEED, 1, 1.0)[0]["samples"]
    comfy.sample.prepare_noise = own
    results["noise by another pack"] = [len(asked), torch.equal(replaced, plain["samples"])]

    lies = torch.rot90(torch.zeros(1, 128, 4, 6), 1, (2, 3))  # its rows lie where columns are
    turned, straight = (ArkSampler4Step.execute(ours, chained, {"samples": x}, SEED, 1, 1.0)[0]["samples"] for x in (lies, lies.contiguous()))  # fmt: skip
    results["latents that lie otherwise"] = [lies.is_contiguous(), torch.equal(turned, straight)]

    class Watching:
        def __init__(self):
            self.asked = []

        def begin(self, kind, result):
            self.asked.append("begin")

        def made(self, result):
            self.asked.append("made")
            return result

    own, results["begun ahead"] = sampling.fast_vae.latents, []
    for preview in (True, False):
        sampling.fast_vae.latents = Watching()
        sampling.sample_klein(ours, chained, empty(64, 64), SEED, 1, 1.0, preview=preview)
        results["begun ahead"].append(sampling.fast_vae.latents.asked)
    sampling.fast_vae.latents = own

    def full(executor, *arguments, **options):
        raise torch.cuda.OutOfMemoryError("as a card would say it")

    crowded = ours.clone()
    crowded.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "full", full)
    try:
        ArkSampler4Step.execute(crowded, chained, empty(4096, 4096), SEED, 4, 1.0)
    except torch.cuda.OutOfMemoryError as error:
        results["out of memory"] = str(error)
print(json.dumps(results))
