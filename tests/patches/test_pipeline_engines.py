"""A pipeline's text encoder and autoencoder in Ark's engines: diffusers' and transformers' numbers, nothing left behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from ark.patches import vae_diffusers
from ark.patches.diffusers import ignite
from ark.patches.pipeline import load_pipeline
from ark.patches.render import Renderer
from ark.patches.text_diffusers import METHOD, attach_text_encoder
from ark.patches.vae_diffusers import attach_vae
from ark.toolkit import text_engine
from ark.toolkit.errors import InputError
from ark.toolkit.jobs import Job
from ark.toolkit.model_files import find_model
from ark.toolkit.pixel_layers import USUAL

diffusers = pytest.importorskip("diffusers", reason="loads diffusers' pipeline")
try:
    find_model()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPT = "a small red circle to the left of a large blue star on a white background"
LIMIT = 1e-5


@pytest.fixture(scope="module")
def embedded():
    pipeline, _ = load_pipeline(device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def on_cpu(monkeypatch):
    """The engines take weights in fp32 on a CPU, too."""
    for module in (text_engine, vae_diffusers):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
        monkeypatch.setattr(module, "DTYPES", (torch.float32,))


@pytest.fixture
def random_vae():
    """FLUX.2's own widths, a quarter of them, and no number that is usual."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 64, 128, 128)).eval()
    for name, tensor in vae.state_dict().items():
        if tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
        if name.endswith("var"):
            tensor.abs_().add_(0.1)
    return vae.requires_grad_(False)


def difference(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def encode(pipeline, prompt, **options):
    return pipeline.encode_prompt(prompt, **options)[0]


def count_runs(engine):
    """A list that gets an entry each time that the engine runs."""
    calls, run = [], engine.run

    def counted(*given):
        calls.append(1)
        return run(*given)

    engine.run = counted
    return calls


@pytest.mark.parametrize("prompt", [PROMPT, "", "many words " * 600, ["a fox", PROMPT]])
def test_the_conditioning_is_transformers(embedded, on_cpu, prompt):
    with torch.no_grad():
        expected = encode(embedded, prompt)
        engine, remove = attach_text_encoder(embedded)
        calls = count_runs(engine)
        found = encode(embedded, prompt)
    assert found.dtype == expected.dtype and difference(found, expected) < LIMIT
    assert len(calls) == 1 and not engine.reasons and len(engine._layers) == 27
    remove()
    assert METHOD not in vars(embedded) and engine._layers is None
    with torch.no_grad():
        assert torch.equal(encode(embedded, prompt), expected)


def test_a_language_model_with_all_its_layers(embedded, on_cpu):
    """As `from_pretrained` loads it: with a head, a last norm and weights that have gradients."""
    from transformers import Qwen3ForCausalLM

    config = copy.deepcopy(embedded.text_encoder.config)
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    config.initializer_range = 0.1
    pipeline = diffusers.Flux2KleinPipeline(**{**embedded.components, "text_encoder": Qwen3ForCausalLM(config).eval()})  # fmt: skip
    with torch.no_grad():
        for taps in ((1, 2, 4), (3, 4, 5)):
            expected = encode(pipeline, PROMPT, text_encoder_out_layers=taps)
            engine, remove = attach_text_encoder(pipeline)
            assert difference(encode(pipeline, PROMPT, text_encoder_out_layers=taps), expected) < LIMIT  # fmt: skip
            assert bool(engine.reasons) == (taps[-1] == 5)  # which is read behind the last norm
            remove()
        expected = encode(pipeline, PROMPT, text_encoder_out_layers=(1, 2, 3))
        attach_text_encoder(pipeline)
        pipeline.text_encoder.model.layers[1].mlp.down_proj.weight.mul_(2)
        pipeline.text_encoder.model.layers[2].input_layernorm.weight = torch.nn.Parameter(torch.rand(config.hidden_size))  # fmt: skip
        changed = encode(pipeline, PROMPT, text_encoder_out_layers=(1, 2, 3))
        vars(pipeline).pop(METHOD)
        assert difference(changed, encode(pipeline, PROMPT, text_encoder_out_layers=(1, 2, 3))) < LIMIT  # fmt: skip
    assert difference(changed, expected) > 100 * LIMIT


def test_a_text_encoder_that_does_not_fit_stays_transformers(embedded, on_cpu, monkeypatch):
    engine, remove = attach_text_encoder(embedded)
    layer = embedded.text_encoder.layers[3]
    handle = layer.register_forward_hook(lambda module, given, out: 2 * out)
    with torch.no_grad():
        found = encode(embedded, PROMPT)
        remove()
        assert torch.equal(found, encode(embedded, PROMPT))
        handle.remove()
        assert difference(encode(embedded, PROMPT), found) > 100 * LIMIT
    assert engine.reasons == {"somebody has hooks on the text encoder"}
    for name, value, reason in (
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "it is not Qwen3 as Klein has it"),
        ("hidden_act", "gelu", "it is not Qwen3 as Klein has it"),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setattr(embedded.text_encoder.config, name, value)
            assert attach_text_encoder(embedded)[0].reasons == {reason}
    none = diffusers.Flux2KleinPipeline(**{**embedded.components, "text_encoder": None})
    assert attach_text_encoder(none)[0].reasons == {"it is not Qwen3 as Klein has it"}
    linear = embedded.text_encoder.layers[0].mlp.up_proj
    linear.base_layer = torch.nn.Identity()  # as PEFT wraps
    assert "adapters" in str(attach_text_encoder(embedded)[0].reasons)
    del linear.base_layer
    monkeypatch.setattr(text_engine, "DTYPES", (torch.bfloat16,))
    assert attach_text_encoder(embedded)[0].reasons == {"its weights are float32"}
    assert METHOD not in vars(embedded)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 5, 7), (1, 1, 2)])
@pytest.mark.parametrize("choices", [{}, {"band": 256}])
def test_the_autoencoder_is_diffusers(random_vae, on_cpu, batch, height, width, choices):
    torch.manual_seed(1)
    z = torch.randn(batch, 32, height, width)
    picture = random_vae.decode(z).sample
    moments = random_vae.encode(picture).latent_dist.parameters
    names = set(vars(random_vae))
    engine, remove = attach_vae(random_vae)
    engine.choices = dataclasses.replace(USUAL, **choices)
    found = random_vae.decode(z, return_dict=False)[0]
    assert found.shape == picture.shape and found.dtype == picture.dtype
    assert difference(found, picture) < LIMIT
    again = random_vae.encode(picture).latent_dist.parameters
    assert again.shape == moments.shape and difference(again, moments) < LIMIT
    assert not engine.reasons and set(engine._records) == {"decode", "encode"}
    remove()
    assert set(vars(random_vae)) == names and not engine._records
    assert torch.equal(random_vae.decode(z).sample, picture)


def test_an_autoencoder_that_is_changed(random_vae, on_cpu):
    z = torch.randn(1, 32, 4, 4)
    engine, _ = attach_vae(random_vae)
    before = random_vae.decode(z).sample
    random_vae.decoder.conv_out.weight.mul_(2)  # is seen
    changed = random_vae.decode(z).sample
    own = type(random_vae)._decode
    assert difference(changed, own(random_vae, z).sample) < LIMIT < difference(changed, before)
    handle = random_vae.decoder.mid_block.register_forward_hook(lambda module, given, out: 2 * out)
    assert torch.equal(random_vae.decode(z).sample, own(random_vae, z).sample)
    handle.remove()
    assert engine.reasons == {"somebody has changed the VAE"}
    random_vae.enable_tiling()
    assert torch.equal(random_vae.decode(z).sample, own(random_vae, z).sample)
    random_vae.disable_tiling()
    asked = z.clone().requires_grad_()
    random_vae.decode(asked).sample.sum().backward()  # by the library
    assert asked.grad is not None
    assert len(engine.reasons) == 2


def test_a_lit_pipeline_makes_the_same_picture_and_is_put_out(embedded, on_cpu, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 80), "red").save(tmp_path / "red.png")
    # sizes and steps that come again: their positions and noise levels are remembered
    jobs = [Job(PROMPT, 3, 64, 64, 2), Job(PROMPT, 3, 64, 80, 1, (str(tmp_path / "red.png"),))]
    jobs += [Job(PROMPT, 4, 64, 64, 3), jobs[0]]
    modules = embedded.transformer, embedded.text_encoder, embedded.vae, embedded.scheduler
    expected = [Renderer(embedded)(job) for job in jobs]
    before = [set(vars(thing)) for thing in (embedded, *modules)]
    renderer = Renderer(embedded)
    with ignite(embedded, engine="fused") as combustion:
        assert "text encoder: Ark." in combustion.report and "VAE: Ark." in combustion.report
        assert "set_timesteps" in vars(embedded.scheduler)
        made = [renderer(job, combustion.run) for job in jobs]
        assert not any(engine.reasons for engine in combustion.engines.values())
        assert set(combustion.engines["VAE"]._records) == {"decode", "encode"}
    for one, other in zip(made, expected, strict=True):
        assert difference(one.latents, other.latents) < LIMIT
    assert [set(vars(thing)) for thing in (embedded, *modules)] == before
    for one, job in zip(expected, jobs, strict=True):
        again = renderer(job)  # whose prompt it knows from Ark's engine
        assert torch.equal(again.latents, one.latents) and again.image == one.image


def test_on_a_cpu_the_libraries_run_and_the_report_says_so(embedded):
    with ignite(embedded, engine="fused") as combustion:
        for name in ("text encoder", "VAE"):
            assert f"{name}: the library's own (its weights are on cpu)." in combustion.report
        assert METHOD not in vars(embedded) and "_decode" not in vars(embedded.vae)


def test_a_step_of_the_librarys_leaves_all_to_it(embedded, on_cpu):
    with ignite(embedded) as combustion:
        assert not combustion.engines and METHOD not in vars(embedded)


@pytest.mark.gpu
def test_on_a_gpu_bf16_is_no_further_off_than_the_libraries_in_bf16(random_vae, monkeypatch):
    """Recorded and not, whole and in bands; against the libraries in fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact, _ = load_pipeline(device="cuda", dtype=torch.float32)
    pipeline, _ = load_pipeline(device="cuda", dtype=torch.bfloat16)
    exact.vae = copy.deepcopy(random_vae).cuda()
    pipeline.vae = random_vae.cuda().bfloat16()
    z = torch.randn(2, 32, 24, 20, device="cuda")
    with torch.no_grad():
        text, picture = encode(exact, PROMPT), exact.vae.decode(z).sample
        moments = exact.vae.encode(picture).latent_dist.mean

        def errors():
            low = z.bfloat16()
            found = encode(pipeline, PROMPT), pipeline.vae.decode(low).sample, pipeline.vae.encode(picture.bfloat16()).latent_dist.mean  # fmt: skip
            return [difference(*pair) for pair in zip(found, (text, picture, moments), strict=True)]

        theirs = errors()
        with ignite(pipeline, engine="fused") as combustion:
            engines = combustion.engines
            for run in range(3):  # not recorded, recorded, replayed
                assert all(0 < mine <= 1.1 * own for mine, own in zip(errors(), theirs, strict=True)), run  # fmt: skip
            assert engines["text encoder"].graphs.recorded == 1
            assert engines["VAE"].graphs.recorded == 2
            engines["VAE"].choices = dataclasses.replace(USUAL, band=256)
            assert all(0 < mine <= 1.1 * own for mine, own in zip(errors(), theirs, strict=True))
            assert not any(engine.reasons for engine in engines.values())
        assert errors() == pytest.approx(theirs, rel=0.01)
