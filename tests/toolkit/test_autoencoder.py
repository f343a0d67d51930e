"""The autoencoder as functions: its variants agree, and on a GPU the kernels with plain torch. The hosts' are in tests/host."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ark.toolkit.autoencoder import Decoder, Encoder, decode, encode
from ark.toolkit.fused import reference
from ark.toolkit.pixel_layers import USUAL, Attention, Block, Conv, Matrix, Norm, fold

WIDTHS, Z = (32, 64, 128, 128), 32
VARIANTS = [{"fold": False}, {"attention": "sdpa"}, {"attention": "rows_half"}, {"band": 240}, {"band": 500}, {"band": 1100, "fold": False}]  # fmt: skip


@pytest.fixture(scope="module")
def records():
    """A decoder and an encoder of FLUX.2's form, a quarter as wide."""
    torch.manual_seed(0)

    def bias(channels):
        return 0.3 * torch.randn(channels)

    def norm(channels):
        return Norm(1 + bias(channels), bias(channels))

    def conv(into, out, double=False):
        weight = 1.5 * (9 * into) ** -0.5 * torch.randn(out, into, 3, 3)
        return Conv(_ordered(weight), bias(out), _ordered(fold(weight)) if double else None)

    def matrix(into, out):
        return Matrix(into**-0.5 * torch.randn(out, into), bias(out))

    def block(into, out):
        shortcut = matrix(into, out) if into != out else None
        return Block(norm(into), conv(into, out), norm(out), conv(out, out), shortcut)

    def middle(c):
        return block(c, c), Attention(norm(c), matrix(c, 3 * c), matrix(c, c)), block(c, c)

    top, latents = WIDTHS[-1], (bias(4 * Z), 1 + bias(4 * Z).abs())
    ups, downs = [], []
    for level, (out, into) in reversed(list(enumerate(zip(WIDTHS, (*WIDTHS[1:], top), strict=True)))):  # fmt: skip
        blocks = [block(into, out), block(out, out), block(out, out)]
        ups.append((blocks, conv(out, out, double=True) if level else None))
    for level, (into, out) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)):
        downs.append(([block(into, out), block(out, out)], conv(out, out) if level < 3 else None))
    decoder = Decoder(*latents, matrix(Z, Z), conv(Z, top), middle(top), ups, norm(WIDTHS[0]), conv(WIDTHS[0], 3))  # fmt: skip
    encoder = Encoder(conv(3, WIDTHS[0]), downs, middle(top), norm(top), conv(top, 2 * Z), matrix(2 * Z, Z), *latents)  # fmt: skip
    return decoder, encoder


def _ordered(weight):
    return weight.contiguous(memory_format=torch.channels_last)


def moved(record, device, dtype):
    """A record elsewhere; matrices and convolutions in another dtype, all else in fp32."""
    if torch.is_tensor(record):
        return record.to(device, dtype if record.dim() > 1 else torch.float32)
    if dataclasses.is_dataclass(record):
        fields = {f.name: moved(getattr(record, f.name), device, dtype) for f in dataclasses.fields(record)}  # fmt: skip
        return type(record)(**fields)
    kinds = (list, tuple)
    return type(record)(moved(part, device, dtype) for part in record) if isinstance(record, kinds) else record  # fmt: skip


def error(found, exact):
    return float((found.float() - exact).norm() / exact.norm())


def test_a_folded_convolution_is_upsampling_and_a_convolution():
    torch.manual_seed(1)
    x, weight = torch.randn(2, 5, 4, 3), torch.randn(6, 5, 3, 3)
    found = F.conv2d(x, fold(weight), padding=1).permute(0, 2, 3, 1).contiguous()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    pixels, _ = reference.interleave(found)
    torch.testing.assert_close(pixels.movedim(-1, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (1, 7, 4)])
def test_variants_agree(records, variant, size):
    torch.manual_seed(2)
    batch, height, width = size
    latents = torch.randn(batch, 4 * Z, height, width)
    choices = dataclasses.replace(USUAL, **variant)
    picture, before = decode(records[0], latents), latents.clone()
    assert picture.shape == (batch, 16 * height, 16 * width, 3) and picture.isfinite().all()
    assert error(decode(records[0], latents, choices=choices), picture) < 1e-5
    back = encode(records[1], picture)
    assert back.shape == latents.shape and torch.equal(before, latents)
    assert error(encode(records[1], picture, choices=choices), back) < 1e-5


def test_a_picture_is_the_same_alone(records):
    latents = torch.randn(3, 4 * Z, 2, 3)
    together = decode(records[0], latents)
    assert error(decode(records[0], latents[1:2]), together[1:2]) < 1e-5
    assert error(encode(records[1], together[1:2]), encode(records[1], together)[1:2]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 9, 21)])
def test_on_a_gpu_no_variant_is_further_off_than_plain_torch(records, size, monkeypatch):
    from ark.toolkit.fused.graph import Graphs
    from ark.toolkit.fused.runner import operations_for

    device = torch.device("cuda")
    operations, how = operations_for(device)
    assert how == "operations in Triton"
    exact, half = ([moved(record, device, dtype) for record in records] for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    batch, height, width = size
    latents = torch.randn(batch, 4 * Z, height, width, device=device)
    pixels = torch.rand(batch, 16 * height, 16 * width, 3, device=device) * 2 - 1
    graphs = Graphs()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.inference_mode():
        for way, x, wide, narrow in zip((decode, encode), (latents, pixels), exact, half, strict=True):  # fmt: skip
            best = way(wide, x)
            usual = error(way(narrow, x), best)  # plain torch in bf16
            assert 0 < usual < 0.05
            for variant in ({}, {"tune": True}, *VARIANTS):
                choices = dataclasses.replace(USUAL, **variant)
                found = error(way(narrow, x, operations, choices), best)
                limit = 2.0 if variant.get("attention") == "rows_half" else 1.2
                assert 0 < found <= limit * usual, (way.__name__, variant, found, usual)
            if graphs.why_not:
                continue
            for turn in range(4):  # the second one is recorded, later ones are replayed
                y = x * (1 - 0.1 * turn)
                found = graphs.run(way.__name__, lambda y, way=way, narrow=narrow: way(narrow, y, operations), y)  # fmt: skip
                torch.testing.assert_close(found, way(narrow, y, operations), rtol=1e-3, atol=2e-2)
            assert graphs.recorded
        assert graphs.why_not or graphs.recorded == 2
    graphs.clear()
