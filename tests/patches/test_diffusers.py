"""A diffusers transformer with Ark's attention and compiled blocks: the same numbers, removable, the library as it was."""

import shutil

import pytest
import torch

from ark.patches import diffusers as patch
from ark.toolkit.errors import InputError, KernelUnavailable
from ark.toolkit.kernels import KERNELS, AttentionKernel

diffusers = pytest.importorskip("diffusers", reason="patches diffusers' transformers")


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    made = diffusers.Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=192, guidance_embeds=False
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def run(transformer, side=4):
    torch.manual_seed(1)
    ids = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    img_ids = torch.zeros(side * side, 4)
    img_ids[:, 1:3] = ids.reshape(-1, 2)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, side * side, 128),
            encoder_hidden_states=torch.randn(1, 20, 192),
            timestep=torch.tensor([0.7]),
            img_ids=img_ids,
            txt_ids=torch.zeros(20, 4),
            guidance=None,
            return_dict=False,
        )[0]


def library():
    """What must not change: every attribute of diffusers' two modules and of their classes."""
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_flux2

    found = {}
    for module in (attention_dispatch, transformer_flux2):
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(module.__name__, name, attribute): v for attribute, v in vars(value).items()}  # fmt: skip
    return found


@pytest.fixture
def counting(monkeypatch):
    calls = []

    def attend(q, k, v):
        calls.append(q.shape)
        return KERNELS["math"].attend(q, k, v)

    kernel = AttentionKernel("counting", (torch.float32,), attend, lambda hardware: None)
    monkeypatch.setitem(KERNELS, "counting", kernel)
    return calls


def test_every_block_reaches_the_kernel_and_removing_leaves_nothing(transformer, counting):
    expected, before = run(transformer), library()
    processors = {name: m.processor for name, m in transformer.named_modules() if hasattr(m, "processor")}  # fmt: skip
    with patch.ignite(transformer, "counting") as combustion:
        assert torch.allclose(run(transformer), expected, atol=1e-5)
        assert counting == [(1, 2, 36, 128)] * 4
        assert combustion.report.startswith("counting: chosen by name")
    assert torch.equal(run(transformer), expected) and len(counting) == 4
    for name, processor in processors.items():
        assert transformer.get_submodule(name).processor is processor
    after = library()
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())


def test_two_transformers_do_not_disturb_each_other(transformer, counting):
    other = diffusers.Flux2Transformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict())
    expected = run(transformer)
    patch.ignite(transformer, "counting")
    assert torch.equal(run(other.eval()), expected) and not counting


def test_a_mask_goes_to_diffusers(transformer, counting):
    seen = []

    def own(query, key, value, attn_mask=None, **options):
        seen.append((attn_mask, options))
        return query

    mask = torch.ones(1)
    dispatch = patch._dispatcher(own, "counting")
    q = torch.randn(1, 6, 2, 128)
    assert dispatch(q, q, q, attn_mask=mask, backend="native") is q
    assert dispatch(q[..., :48], q[..., :48], q[..., :48], backend=None) is not None
    assert dispatch(q.double(), q.double(), q.double(), parallel_config=None) is not None
    assert [m for m, _ in seen] == [mask, None, None] and seen[0][1] == {"backend": "native"}
    assert dispatch(q, q, q, backend=None).shape == q.shape and len(counting) == 1


def test_a_run_that_is_not_finite_is_repeated_on_the_librarys_attention(transformer, monkeypatch, caplog):  # fmt: skip
    expected, calls = run(transformer), []

    def overflow(q, k, v):
        calls.append(1)
        return q / 0 if len(calls) == 2 else KERNELS["math"].attend(q, k, v)

    kernel = AttentionKernel("overflow", (torch.float32,), overflow, lambda hardware: None)
    monkeypatch.setitem(KERNELS, "overflow", kernel)
    combustion = patch.ignite(transformer, "overflow")
    assert torch.equal(combustion.run(lambda: run(transformer)), expected) and len(calls) == 4
    assert "not finite" in caplog.text
    caplog.clear()
    assert torch.equal(combustion.run(lambda: run(transformer)), expected) and len(calls) == 4
    assert not caplog.text and not transformer._forward_hooks


@pytest.mark.parametrize("attention", ["none", "counting"])
def test_the_fused_engine_computes_the_same_and_leaves_nothing(transformer, counting, attention):
    before, names = library(), set(vars(transformer))
    expected = {side: run(transformer, side) for side in (4, 5)}
    with patch.ignite(transformer, attention, engine="fused") as combustion:
        for side, reference in expected.items():
            assert torch.allclose(run(transformer, side), reference, rtol=1e-4, atol=1e-5)
        assert not combustion.runner.reasons and len(counting) == (
            8 if attention == "counting" else 0
        )
    assert torch.equal(run(transformer), expected[4]) and set(vars(transformer)) == names
    assert all(library()[key] is value for key, value in before.items())


def test_the_fused_engine_in_fp8_follows_its_weights(transformer):
    expected = run(transformer)
    with patch.ignite(transformer, "none", engine="fused", precision="fp8") as combustion:
        low = run(transformer)
        assert 0 < (low - expected).norm() < 0.1 * expected.norm()
        assert len(combustion.runner._made) == 20  # 4 a stream, 2 a single block
        attn = transformer.transformer_blocks[0].attn
        attn.to_k.weight = torch.nn.Parameter(-4 * attn.to_k.weight, requires_grad=False)
        changed = run(transformer)
        transformer.proj_out.weight.mul_(1)  # nothing but the count has changed
        out = transformer.transformer_blocks[0].ff.linear_out
        out.weight.mul_(-8)  # in place, as a LoRA is fused
        again = run(transformer)
    reference = run(transformer)
    assert (again - reference).norm() < 0.1 * (again - changed).norm()
    out.weight.div_(-8)
    reference = run(transformer)
    assert (changed - reference).norm() < 0.02 * reference.norm()
    assert (changed - reference).norm() < 0.5 * (low - reference).norm()
    assert not combustion.runner._made


def test_what_the_fused_engine_does_not_know_goes_to_the_library(transformer, caplog):
    with patch.ignite(transformer, "none", engine="fused") as combustion:
        transformer.transformer_blocks[
            1
        ].ff.linear_in.base_layer = torch.nn.Identity()  # as PEFT wraps
        for _ in range(2):
            run(transformer)
    assert (
        len(combustion.runner.reasons) == 1 and caplog.text.count("own forward runs instead") == 1
    )


def test_what_cannot_be_is_refused(transformer):
    with pytest.raises(KernelUnavailable):
        patch.ignite(transformer, "sage")
    for arguments, message in (
        ({"compile": "fastest"}, "fastest is not one of off, default"),
        ({"engine": "warp"}, "warp is not one of diffusers, fused"),
        ({"engine": "fused", "compile": "default"}, "nothing to compile"),
        ({"precision": "fp8"}, "precision of the fused engine"),
        ({"engine": "fused", "precision": "fp4"}, "fp4 is not one of bf16, fp8"),
    ):
        with pytest.raises(InputError, match=message):
            patch.ignite(transformer, "none", **arguments)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_blocks_are_compiled_once_for_every_size_and_uncompiled_again(transformer, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    expected = {side: run(transformer, side) for side in (4, 5, 6)}
    with patch.ignite(transformer, "math", "default") as combustion:
        counter = combustion.compiler
        for side, reference in expected.items():
            assert torch.allclose(run(transformer, side), reference, atol=1e-4)
        assert counter.graphs == 2
    assert torch.equal(run(transformer), expected[4]) and any(counter.cache.glob("*.bin"))
