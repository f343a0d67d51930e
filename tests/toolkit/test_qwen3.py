"""Klein's text encoder against transformers' Qwen3."""

import copy

import pytest
import torch

from ark.toolkit import qwen3
from ark.toolkit.embedded import embedded_text_encoder
from ark.toolkit.fused.matrix import Joined, Plain
from ark.toolkit.igniter import open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
WIDTH, MLP, LAYERS, TAPS = 96, 160, 5, (1, 3, 5)
LENGTHS = (9, 4, 0)  # tokens of each prompt that are not padding


@pytest.fixture(scope="module")
def model():
    """A tiny Qwen3 with four heads on two."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS + 1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    found = transformers.Qwen3Model(config).eval().requires_grad_(False)
    for name, weight in found.named_parameters():
        weight.copy_(1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.1 * torch.randn_like(weight))  # fmt: skip
    return found


def record(model, dtype=torch.float32):
    def layer(block):
        attn, mlp = block.self_attn, block.mlp
        q, k, v, o, gate, up, down = (
            part.weight.to(dtype)
            for part in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )  # fmt: skip
        norms = block.input_layernorm.weight, attn.q_norm.weight, attn.k_norm.weight, block.post_attention_layernorm.weight  # fmt: skip
        return qwen3.Layer(norms[0], qwen3.join(q, v), k, o, *norms[1:], qwen3.join(gate, up), down)

    return [layer(block) for block in model.layers]


def by_transformers(model, embeds, present):
    """The taps, with the mask written out: causal, and nobody looks at padding."""
    visible = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril() & present[:, None, None]  # fmt: skip
    bias = torch.zeros(visible.shape, dtype=embeds.dtype).masked_fill(~visible, -1e30)
    found = model(
        inputs_embeds=embeds, attention_mask={"full_attention": bias}, output_hidden_states=True, use_cache=False
    )  # fmt: skip
    return torch.stack([found.hidden_states[tap] for tap in TAPS], 2)


@pytest.fixture
def inputs():
    """Three prompts, one of nothing but padding."""
    torch.manual_seed(1)
    embeds = torch.randn(len(LENGTHS), 9, WIDTH)
    return embeds, torch.arange(9) < torch.tensor(LENGTHS)[:, None]


def test_it_is_qwen3(model, inputs):
    before = inputs[0].clone()
    found = qwen3.hidden_states(record(model), *inputs, TAPS)
    expected = by_transformers(model, *inputs)
    assert torch.equal(inputs[0], before)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    # a prompt of padding sees padding
    alone = inputs[0][2:], torch.ones(1, 9, dtype=torch.bool)
    assert found[2].isfinite().all()
    flat = qwen3.hidden_states(record(model), *alone, TAPS)
    assert not torch.allclose(found[2], flat[0], atol=1e-3)


def test_a_prompt_is_the_same_alone(model, inputs):
    together = qwen3.hidden_states(record(model), *inputs, TAPS)
    alone = qwen3.hidden_states(record(model), inputs[0][1:2], inputs[1][1:2], TAPS)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_bf16_is_no_further_off_than_transformers_bf16(model, inputs):
    embeds, present = inputs[0][:2], inputs[1][:2]
    exact = by_transformers(model, embeds, present)
    found = qwen3.hidden_states(record(model, torch.bfloat16), embeds, present, TAPS)
    other = by_transformers(copy.deepcopy(model).bfloat16(), embeds.bfloat16(), present).float()
    assert 0 < (found - exact).norm() <= 1.1 * (other - exact).norm()


def test_matrices_that_lie_together_are_one():
    both = torch.randn(7, 4)
    joined = qwen3.join(both[:3], both[3:])
    assert isinstance(joined, Plain) and joined.weight.data_ptr() == both.data_ptr()
    assert torch.equal(joined.weight, both)
    for apart in ((both[3:], both[:3]), (both[:3].clone(), both[3:]), (both[:2], both[3:])):
        joined = qwen3.join(*apart)
        assert isinstance(joined, Joined)
        x = torch.randn(2, 4)
        torch.testing.assert_close(joined(x), x @ torch.cat(apart).T)


def test_in_a_file_what_is_multiplied_together_lies_together(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    tensors = open_model(embedded_text_encoder()).tensors
    at = "model.layers.3.{}.weight".format
    for first, second in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
        both = tensors[at(first)], tensors[at(second)]
        joined = qwen3.join(*both)
        assert isinstance(joined, Plain) and torch.equal(joined.weight, torch.cat(both))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [512, 77, 700])
def test_on_a_gpu_a_recording_gives_what_transformers_gives_in_fp32(model, length):
    from ark.toolkit.fused.graph import Graphs
    from ark.toolkit.fused.runner import operations_for

    device = torch.device("cuda")
    operations, how = operations_for(device)
    assert how == "operations in Triton"
    layers = record(copy.deepcopy(model).to(device), torch.bfloat16)
    graphs = Graphs()
    if graphs.why_not:
        pytest.skip(graphs.why_not)
    torch.manual_seed(2)
    for turn in range(4):  # the second one is recorded, later ones are replayed
        embeds = torch.randn(1, length, WIDTH)
        present = torch.arange(length)[None] < (length // 3 + turn if turn else length)
        inputs = embeds.to(device), present.to(device)
        assert graphs.settled("key", *inputs) == (turn > 1)
        found = graphs.run(
            "key", lambda x, mask: qwen3.hidden_states(layers, x, mask, TAPS, operations), *inputs
        ).cpu()
        exact = by_transformers(model, embeds, present)
        other = by_transformers(copy.deepcopy(model).bfloat16(), embeds.bfloat16(), present).float()
        assert 0 < (found - exact).norm() <= 1.1 * (other - exact).norm()
    assert graphs.recorded == 1
    graphs.clear()
