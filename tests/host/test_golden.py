"""Golden numerics in fp32 on CPU: Ark's nodes, the host's stock classes, and diffusers agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

PROMPT = "a small red circle to the left of a large blue star on a white background"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
pytestmark = pytest.mark.host


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(scope="module")
def golden_models(tmp_path_factory):
    """Random tiny Klein of diffusers' and transformers' own classes, saved under the names each loader reads."""
    diffusers = pytest.importorskip("diffusers", reason="golden numerics compare with diffusers")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ark.toolkit.keys import transformer_from_diffusers

    folder = tmp_path_factory.mktemp("golden")
    torch.manual_seed(3)
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=2,
        joint_attention_dim=192,
        guidance_embeds=False,
    )
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=28, num_attention_heads=1,
            num_key_value_heads=1, head_dim=128, tie_word_embeddings=True, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), sample_size=256)
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    for module in (transformer, text_encoder, vae):
        module.eval().requires_grad_(False)
    weights = {k: v.clone() for k, v in transformer.state_dict().items()}
    save_file(weights, folder / "transformer.safetensors")
    save_file(transformer_from_diffusers(weights), folder / "transformer_comfy.safetensors")
    save_file(
        {f"model.{k}": v for k, v in text_encoder.model.state_dict().items()},
        folder / "text_encoder.safetensors",
    )
    save_file(
        {k: v for k, v in vae.state_dict().items() if v.is_floating_point()},
        folder / "vae.safetensors",
    )
    return folder, transformer, text_encoder, vae


@pytest.fixture(scope="module")
def golden(comfyui, golden_models, run_in_host, tmp_path_factory):
    """What one host computed, Ark's side and its own."""
    folder, *_ = golden_models
    out = tmp_path_factory.mktemp("out") / "golden.safetensors"
    run_in_host(comfyui, "golden_run.py", folder, out)
    return comfyui, load_file(out)


@pytest.fixture(scope="module")
def pipeline(comfyui, golden_models):
    """diffusers' own pipeline around the same modules."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import AutoTokenizer

    _, transformer, text_encoder, vae = golden_models
    tokenizer = AutoTokenizer.from_pretrained(
        comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    )
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = "<|endoftext|>"
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made = Flux2KleinPipeline(
        scheduler, vae, text_encoder, tokenizer, transformer, is_distilled=True
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_latents_equal_the_hosts_stock_nodes(golden):
    _, found = golden
    assert found["latents"].std() > 0.1
    assert relative_error(found["latents"], found["stock_latents"]) < 1e-5


def test_conditioning_of_27_layers_equals_all_layers_bit_for_bit(golden):
    _, found = golden
    assert found["layers"] == 27  # of the file's 28
    assert torch.equal(found["conditioning"], found["stock_conditioning"])


def test_tokens_equal_stock(golden):
    host, found = golden
    if "stock_tokens" not in found:
        pytest.skip(f"{host.name} has no Klein tokenizer of its own")
    assert torch.equal(found["tokens"], found["stock_tokens"])


def test_latents_equal_diffusers(golden, pipeline):
    _, found = golden
    ids = found["tokens"].long()
    mask = (torch.cumsum(ids.eq(151643), 1) == 0).long()
    out = pipeline.text_encoder(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    )
    embeds = torch.cat([out.hidden_states[tap] for tap in (9, 18, 27)], -1)
    assert relative_error(found["conditioning"], embeds) < 1e-5
    height, width = (16 * n for n in found["noise"].shape[-2:])
    result = pipeline(
        prompt_embeds=embeds, latents=found["noise"], num_inference_steps=4, guidance_scale=1.0, height=height,
        width=width, output_type="latent",
    ).images  # fmt: skip
    # the pipeline's latents are already unpacked and un-normalised: bring Ark's to the same place
    vae = pipeline.vae
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    latents = found["latents"] * std + vae.bn.running_mean.view(1, -1, 1, 1)
    assert relative_error(torch.nn.functional.pixel_shuffle(latents, 2), result) < 1e-5


def test_tokens_are_kleins(golden, pipeline):
    _, found = golden
    assert found["tokens"].shape[1] == 512
    head = found["tokens"][0].long().tolist()
    head = head[: head.index(151643)]
    tokenizer = pipeline.tokenizer
    start = tokenizer(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert head == [*start, 151667, 271, 151668, 271]


def test_decode_equals_diffusers(golden, pipeline):
    _, found = golden
    vae = pipeline.vae
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    latents = found["latents"] * std + vae.bn.running_mean.view(1, -1, 1, 1)
    picture = vae.decode(torch.nn.functional.pixel_shuffle(latents, 2)).sample
    expected = (picture.clamp(-1, 1) * 0.5 + 0.5).movedim(1, -1)
    assert relative_error(found["image"], expected) < 1e-5


@pytest.fixture(scope="module")
def headless(comfyui, golden_models):
    """The trigger script's pipeline from the same files: ComfyUI's names for the transformer, diffusers' for the rest."""
    from ark.patches.pipeline import load_pipeline

    folder, *_ = golden_models
    tokenizer = comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    names = ("transformer_comfy", "text_encoder", "vae")
    made, _ = load_pipeline([*(folder / f"{name}.safetensors" for name in names), tokenizer])
    made.set_progress_bar_config(disable=True)
    return made


def test_the_headless_conditioning_and_noise_equal_the_hosts(golden, headless):
    from ark.toolkit.noise import klein_noise

    _, found = golden
    embeds, _ = headless.encode_prompt(PROMPT)
    assert len(headless.text_encoder.layers) == 27
    assert relative_error(embeds, found["stock_conditioning"]) < 1e-5
    assert torch.equal(klein_noise(7, 256, 192), found["noise"])


@pytest.mark.parametrize("options", [{"attention": "none"}, {"engine": "fused"}], ids=str)
def test_headless_latents_equal_the_hosts_stock_nodes(golden, headless, options):
    from ark.patches.diffusers import ignite
    from ark.patches.render import Renderer
    from ark.toolkit.jobs import Job

    _, found = golden
    with ignite(headless, **options) as combustion:
        made = Renderer(headless)(Job(PROMPT, 7, 256, 192), combustion.run)
    # the pipeline's latents are already unpacked and un-normalised: bring the host's to the same place
    vae = headless.vae
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    latents = found["stock_latents"] * std + vae.bn.running_mean.view(1, -1, 1, 1)
    assert relative_error(made.latents, torch.nn.functional.pixel_shuffle(latents, 2)) < 1e-5
    pixels = torch.from_numpy(np.array(made.image))[None] / 255
    assert (pixels - found["image"]).abs().max() < 0.5 / 255 + 1e-4
