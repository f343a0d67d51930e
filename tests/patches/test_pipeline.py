"""diffusers' pipeline around a model's files: the same numbers as diffusers' own loading, nothing copied, no network."""

import socket

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ark.patches import pipeline as loading
from ark.patches.diffusers import ignite
from ark.patches.pipeline import load_pipeline
from ark.patches.render import Renderer, _settled
from ark.toolkit.embedded import ASSETS, embedded_text_encoder
from ark.toolkit.errors import ArkError, InputError, ModelFileError
from ark.toolkit.jobs import Job
from ark.toolkit.model_files import find_model
from ark.toolkit.noise import klein_noise
from ark.toolkit.shipment import Shipment

diffusers = pytest.importorskip("diffusers", reason="loads diffusers' pipeline")
try:
    TOKENIZER = find_model().tokenizer
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPT = "a small red circle to the left of a large blue star on a white background"
KLEIN = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
VAE = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"


@pytest.fixture(scope="module")
def embedded():
    pipeline, _ = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Klein of diffusers' and transformers' own, saved by them in shards."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("saved") / "klein"
    torch.manual_seed(3)
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=192, guidance_embeds=False
    )  # fmt: skip
    config = Qwen3Config(
        vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=29, num_attention_heads=1,
        num_key_value_heads=1, head_dim=128, tie_word_embeddings=True, initializer_range=0.1, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), sample_size=256)
    vae.bn.running_mean.normal_(0, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    tokenizer.chat_template = "{# enable_thinking #}{% for m in messages %}{{ m['content'] }}!{% endfor %}"  # fmt: skip
    tokenizer.pad_token = "<|endoftext|>"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler, vae.eval(), Qwen3ForCausalLM(config).eval(), tokenizer, transformer.eval(), is_distilled=True
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="3MB")
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


def test_a_diffusers_folder_gives_what_diffusers_itself_gives(saved):
    folder, own = saved
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    pipeline, report = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is diffusers.Flux2KleinPipeline and pipeline.config.is_distilled
    assert len(pipeline.text_encoder.layers) == 27
    assert pipeline.text_encoder.config.rms_norm_eps == 1e-5  # the folder's own settings
    for part in ("transformer", "vae"):
        expected = dict(getattr(own, part).state_dict())
        found = getattr(pipeline, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    embeds, _ = pipeline.encode_prompt(PROMPT)
    with torch.no_grad():
        expected, _ = own.encode_prompt(PROMPT)
    assert torch.allclose(embeds, expected, rtol=1e-4, atol=1e-5)
    options = dict(prompt=PROMPT, latents=klein_noise(1, 64, 64), width=64, height=64, num_inference_steps=4, guidance_scale=1.0, output_type="pt")  # fmt: skip
    assert torch.allclose(pipeline(**options).images, own(**options).images, atol=1e-4)
    assert report.nbytes > 0 and report.seconds > report.waiting


def test_weights_in_the_right_dtype_are_not_copied(saved):
    pipeline, _ = load_pipeline(saved[0], device="cpu", dtype=torch.float32)
    stores = {p.untyped_storage().data_ptr() for p in pipeline.transformer.parameters()}
    assert len(stores) == len(list((saved[0] / "transformer").glob("*.safetensors")))


def test_nothing_is_looked_up_in_the_network(monkeypatch, saved):
    def refuse(*args, **options):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for model in ((), saved[0]):
        pipeline, _ = load_pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        Renderer(pipeline)(Job("a", 0, 64, 64, 1))


def test_comfyuis_vocabulary_gets_kleins_tokens(embedded):
    text = embedded.tokenizer.apply_chat_template([{"role": "user", "content": "a fox"}], tokenize=False, add_generation_prompt=True, enable_thinking=False)  # fmt: skip
    ids = embedded.tokenizer(text)["input_ids"]
    start = embedded.tokenizer("<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n")["input_ids"]  # fmt: skip
    assert ids == [*start, 151667, 271, 151668, 271]


@pytest.mark.parametrize("prompt", ["a fox", PROMPT, "many words " * 600])
def test_the_conditioning_is_the_pipelines_own(embedded, prompt):
    encode = Renderer(embedded).encode
    with torch.no_grad():
        expected, _ = embedded.encode_prompt(prompt)
        found = encode(prompt)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert encode(prompt) is found  # remembered


def test_an_fp8_file_gives_nearly_the_same(embedded, tmp_path):
    weights, scaled = load_file(KLEIN), {}
    for key, tensor in weights.items():
        if "_blocks." in key and tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            scaled[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[key.replace(".weight", ".weight_scale")] = scale
        else:
            scaled[key] = tensor
    save_file(scaled, tmp_path / "fp8.safetensors")
    pipeline, _ = load_pipeline([tmp_path / "fp8.safetensors", embedded_text_encoder(), VAE])
    pipeline.set_progress_bar_config(disable=True)
    job = Job(PROMPT, 42, 64, 64)
    low, full = Renderer(pipeline)(job).latents, Renderer(embedded)(job).latents
    assert 0 < (low - full).norm() < 0.15 * full.norm()


def test_a_job_is_the_pipelines_own_call(embedded):
    job = Job(PROMPT, 42, 128, 64)
    made = Renderer(embedded)(job)
    assert made.image.size == (128, 64) and set(made.seconds) == {"encode", "steps", "decode"}
    expected = embedded(prompt=PROMPT, latents=klein_noise(42, 128, 64), width=128, height=64, num_inference_steps=4, guidance_scale=1.0, output_type="latent").images  # fmt: skip
    assert torch.allclose(made.latents, expected, atol=1e-5)
    with torch.no_grad():
        picture = embedded.vae.decode(made.latents, return_dict=False)[0]
    assert made.image == embedded.image_processor.postprocess(picture, output_type="pil")[0]


def test_where_a_pipeline_runs_is_looked_for_once(embedded, monkeypatch):
    renderer = Renderer(embedded)
    monkeypatch.setattr(type(embedded), "_execution_device", property(lambda self: pytest.fail("asked again")))  # fmt: skip
    assert renderer(Job("a red circle", 1, 64, 64, 1)).image.size == (64, 64)
    assert type(embedded) is diffusers.Flux2KleinPipeline


def test_a_pipeline_that_offloads_says_itself_where_it_runs(embedded, monkeypatch):
    assert _settled(embedded) is not embedded
    monkeypatch.setattr(type(embedded), "_execution_device", torch.device("meta"))
    assert _settled(embedded) is embedded


def test_references_change_the_picture_and_their_order_matters(embedded, tmp_path):
    for name, color in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (80, 64), color).save(tmp_path / name)
    red, blue = (str(tmp_path / name) for name in ("red.png", "blue.png"))
    made = [Renderer(embedded)(Job(PROMPT, 1, 64, 64, 2, images)).latents for images in ((), (red,), (red, blue), (blue, red))]  # fmt: skip
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(made) for b in made[:i])
    Image.new("RGB", (32, 64)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="small.png"):
        Renderer(embedded)(Job(PROMPT, 1, 64, 64, 1, (str(tmp_path / "small.png"),)))


def test_it_stops_at_the_next_step_and_leaves_the_transformer_as_it_was(embedded):
    steps = []

    def at_step():
        steps.append(1)
        if len(steps) == 3:  # after encoding and two steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Renderer(embedded)(Job(PROMPT, 1, 64, 64, 4), at_step=at_step)
    assert len(steps) == 3
    assert not embedded.transformer._forward_hooks and not embedded.transformer._forward_pre_hooks


def test_the_pipeline_can_be_set_alight_and_put_out(embedded):
    job = Job(PROMPT, 3, 64, 64, 2)
    before, names = Renderer(embedded)(job).latents, set(vars(embedded.transformer))
    with ignite(embedded, engine="fused") as combustion:
        fused = Renderer(embedded)(job, combustion.run).latents
        assert not combustion.runner.reasons
    assert torch.allclose(fused, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(Renderer(embedded)(job).latents, before)
    assert set(vars(embedded.transformer)) == names


def test_bf16_computes_in_bf16_with_latents_in_fp32(embedded):
    pipeline, _ = load_pipeline(dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    job = Job(PROMPT, 42, 32, 32)  # convolutions in bf16 are slow on a CPU
    made, expected = Renderer(pipeline)(job), Renderer(embedded)(job)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
    assert made.latents.dtype == torch.float32
    assert (made.latents - expected.latents).norm() < 0.1 * expected.latents.norm()


@pytest.mark.parametrize("lost", ["transformer", "text_encoder", "vae"])
def test_a_tensor_that_is_missing_is_named(tmp_path, lost):
    paths = {"transformer": KLEIN, "text_encoder": embedded_text_encoder(), "vae": VAE}
    keys = {
        "transformer": "double_blocks.1.img_mlp.2.weight",
        "text_encoder": "model.layers.3.mlp.up_proj.weight",
        "vae": "decoder.conv_out.bias",
    }
    weights = load_file(paths[lost])
    del weights[keys[lost]]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ModelFileError, match="less.safetensors lacks 1 tensors"):
        load_pipeline([*(path for part, path in paths.items() if part != lost), tmp_path / "less.safetensors"])  # fmt: skip


def test_what_cannot_be_is_refused(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no NVIDIA GPU"):
            load_pipeline(device="cuda")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArkError, match="tokenizer in .* cannot be read"):
        load_pipeline([tmp_path])


def test_a_gpu_without_room_is_refused_before_anything_is_sent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    check = loading._check_room
    monkeypatch.setattr(loading, "_check_room", lambda device, *given: check(torch.device("cuda"), *given))  # fmt: skip
    monkeypatch.setattr(loading, "Shipment", lambda *given: pytest.fail("it was sent"))
    with pytest.raises(InputError, match=r"needs 0\.\d GB on the GPU, 0\.0 GB are free"):
        load_pipeline()


def test_what_is_on_its_way_is_given_up_when_loading_fails(monkeypatch):
    given_up = []
    monkeypatch.setattr(Shipment, "cancel", lambda self: given_up.append(self))
    monkeypatch.setattr(loading, "load_tokenizer", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_pipeline()
    assert len(given_up) == 3
