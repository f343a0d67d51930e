"""The autoencoder as two functions, recorded as CUDA graphs where that helps, in place of the host's modules.

The host runs them itself wherever those functions do not fit: on a CPU, from weights in anything but bf16, with weights
that are not all on the device, or with modules that another node has changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as host
import comfy.model_management
import torch

from ..toolkit.architecture import SPATIAL_FACTOR
from ..toolkit.autoencoder import Decoder, Encoder, decode, encode
from ..toolkit.fused.graph import Graphs
from ..toolkit.fused.runner import Unknown, operations_for
from ..toolkit.pixel_layers import USUAL, Attention, Block, Conv, Matrix, Middle
from ..toolkit.pixel_memory import BAND, MOST, RECORDED, ROOM, SHARE, needed, numbers
from ..toolkit.pixel_records import (
    check_weights,
    conv,
    matrix,
    norm,
)

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16,)
PARTS = {"decode": host.Decoder, "encode": host.Encoder}
log = logging.getLogger("ark")


class VaeEngine:
    """Runs one autoencoder where its weights lie.

    Args:
        model: the host's AutoencoderKL.
        masters: of its patcher, which say when a weight has moved or changed; None if none ever will.

    Attributes:
        graphs: recordings, one for each shape.
        reasons: why the host ran it instead.
        choices: how it is computed.
    """

    def __init__(self, model: Any, masters: Any = None):
        self.model, self.graphs, self.choices = model, Graphs(), USUAL
        self.reasons: set[str] = set()
        self._modules = tuple(model.modules())
        self._records: dict[
            str, tuple[tuple[int, int], Decoder | Encoder]
        ] = {}  # and where the weights lay
        if masters is not None:
            masters.watchers.add(self)

    def weights_changed(self) -> None:
        """Give up what was made of the weights."""
        self.graphs.clear()
        self._records.clear()

    def refuse(self, reason: str) -> None:
        """The host has to run it; the log says why, once."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            log.info("Ark VAE: ComfyUI's own code runs (%s).", reason)

    def hopeful(self, way: str, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it is worth trying, before the weights are on the device; the log says why not, once."""
        if device.type not in DEVICES or dtype not in DTYPES:
            self.refuse(f"it is {str(dtype).removeprefix('torch.')} on {device.type}")
        elif type(getattr(self.model, PARTS[way].__name__.lower())) is not PARTS[way] or any(map(_changed, self._modules)):  # fmt: skip
            self.refuse("another node has changed the VAE")
        else:
            return True
        return False

    def record(self, way: str) -> Any:
        """The weights of one way, "decode" or "encode", whose part is `hopeful`; None if the host has to run it."""
        part = self.model.decoder if way == "decode" else self.model.encoder
        lies = part.conv_in.weight.data_ptr(), part.conv_out.weight.data_ptr()
        if self._records.get(way, (None,))[0] != lies:
            if way in self._records:  # recordings read what was made of the old ones
                self.weights_changed()
            try:
                made = _decoder(self.model) if way == "decode" else _encoder(self.model)
            except Unknown as unknown:
                self.refuse(str(unknown))
                return None
            self._records[way] = lies, made
        return self._records[way][1]

    def needed(self, way: str, height: int, width: int, band: bool = False) -> int:
        """Bytes that a picture takes while it is computed, px; an estimate."""
        return needed(way, height * width, self._width(way), self._itemsize, band)

    def copies(self, way: str) -> int:
        """Bytes of the copies of weights that are still to be made."""
        if way in self._records:
            return 0
        part = self.model.decoder if way == "decode" else self.model.encoder
        numbers = sum(weight.numel() for weight in part.parameters())
        return int(1.3 * numbers * self._itemsize)

    def at_once(self, way: str, batch: int, height: int, width: int, free: int) -> int:
        """How many pictures of a batch fit into so many bytes, px; 0 if not even one does."""
        room = (free - ROOM) // (self.needed(way, height, width) - ROOM)
        return max(
            0, min(batch, room, (MOST - 1) // numbers(way, height * width, self._width(way)))
        )

    def _width(self, way: str) -> int:
        """Channels at the size of the picture."""
        return self.model.decoder.ch if way == "decode" else self.model.encoder.ch

    @property
    def _itemsize(self) -> int:
        return self.model.post_quant_conv.weight.itemsize

    def decode(self, record: Decoder, latents: torch.Tensor, band: bool = False, lasting: bool = True) -> torch.Tensor:  # fmt: skip
        """See `autoencoder.decode`; in bands if memory is short; recorded if the size is to come again."""
        height, width = (SPATIAL_FACTOR * side for side in latents.shape[2:])
        nbytes = len(latents) * self.needed("decode", height, width)
        return self._run(decode, record, latents, band, lasting and _recordable(nbytes, latents))

    def encode(self, record: Encoder, pixels: torch.Tensor, band: bool = False, lasting: bool = True) -> torch.Tensor:  # fmt: skip
        """See `autoencoder.encode`; otherwise as `decode`."""
        nbytes = len(pixels) * self.needed("encode", *pixels.shape[1:3])
        return self._run(encode, record, pixels, band, lasting and _recordable(nbytes, pixels))

    def _run(self, function: Callable, record: Any, x: torch.Tensor, band: bool, lasting: bool) -> torch.Tensor:  # fmt: skip
        operations, _ = operations_for(x.device)
        choices = dataclasses.replace(self.choices, band=BAND) if band else self.choices

        def work(x: torch.Tensor) -> torch.Tensor:
            return function(record, x, operations, choices)

        if choices.band or not lasting:
            return work(x)
        return self.graphs.run(self._key(record, function.__name__), work, x)

    def _key(self, record: Any, way: str) -> Hashable:
        return record.first.weight.data_ptr(), way, self.choices

    def is_recorded(self, way: str, shape: Sequence[int], device: torch.device) -> bool:
        """Whether an input in fp32 of this shape would need no memory that is not there already."""
        record = self._records.get(way, (None, None))[1]
        form = tuple(shape), torch.float32, device
        return record is not None and self.graphs.holds(self._key(record, way), form)


def _recordable(nbytes: int, x: torch.Tensor) -> bool:
    """Whether a recording, which keeps the memory that it needs, leaves enough to others."""
    return nbytes <= min(RECORDED, comfy.model_management.get_total_memory(x.device) // SHARE)


def _changed(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _decoder(model: Any) -> Decoder:
    """The record; raises Unknown if something is not as the engine needs it."""
    part = _checked(model, model.decoder, host.Decoder)
    if part.tanh_out:
        raise Unknown("it ends in a tanh")
    mean, deviation = _latents(model)
    levels = [
        (list(map(_block, level.block)), _resize(level.upsample, double=True) if number else None)
        for number, level in reversed(list(enumerate(part.up)))
    ]
    return Decoder(
        mean,
        deviation,
        matrix(model.post_quant_conv),
        conv(part.conv_in),
        _middle(part.mid),
        levels,
        norm(part.norm_out),
        conv(part.conv_out),
    )


def _encoder(model: Any) -> Encoder:
    """The record; raises Unknown if something is not as the engine needs it."""
    part = _checked(model, model.encoder, host.Encoder)
    mean, deviation = _latents(model)
    levels = [
        (list(map(_block, level.block)), _resize(level.downsample) if hasattr(level, "downsample") else None)
        for level in part.down
    ]  # fmt: skip
    whole = matrix(model.quant_conv)
    half = len(whole.bias) // 2  # the mean; the rest would be its variance
    return Encoder(
        conv(part.conv_in),
        levels,
        _middle(part.mid),
        norm(part.norm_out),
        conv(part.conv_out),
        Matrix(whole.weight[:half], whole.bias[:half]),
        mean,
        deviation,
    )


def _checked(model: Any, part: Any, kind: type) -> Any:
    """The encoder or decoder of the host's module, if it is of the kind that the engine knows, and on a fast device."""
    weights = [*part.parameters(), model.quant_conv.weight, model.post_quant_conv.weight]
    check_weights(weights, DEVICES, DTYPES)
    levels = part.up if kind is host.Decoder else part.down
    known = type(part) is kind and model.bn is not None and model.max_batch_size is None
    if not known or getattr(part, "carried", False) or any(len(level.attn) for level in levels):
        raise Unknown("it is not FLUX.2's")
    return part


def _latents(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents."""
    device = model.post_quant_conv.weight.device
    mean, variance = (t.to(device, torch.float32) for t in (model.bn.running_mean, model.bn.running_var))  # fmt: skip
    return mean, (variance + model.bn_eps).sqrt()


def _middle(part: Any) -> Middle:
    attn = part.attn_1
    attention = Attention(norm(attn.norm), matrix(attn.q, attn.k, attn.v), matrix(attn.proj_out))
    return _block(part.block_1), attention, _block(part.block_2)


def _block(block: Any) -> Block:
    if type(block) is not host.ResnetBlock or block.use_conv_shortcut:
        raise Unknown("its blocks are of another kind")
    shortcut = matrix(block.nin_shortcut) if block.in_channels != block.out_channels else None
    return Block(norm(block.norm1), conv(block.conv1), norm(block.norm2), conv(block.conv2), shortcut)  # fmt: skip


def _resize(layer: Any, double: bool = False) -> Conv:
    if not layer.with_conv or getattr(layer, "scale_factor", 2.0) != 2.0:
        raise Unknown("it changes sizes in another way")
    return conv(layer.conv, double)
