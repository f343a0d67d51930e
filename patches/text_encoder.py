"""Klein's text encoder as the host's own CLIP: its tokenizer, template and taps on the host's Qwen3, 27 layers of it."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import threading
from array import array
from itertools import chain
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import comfy.text_encoders.z_image
import folder_paths
import torch
from comfy import sd1_clip

from ..toolkit.architecture import NEEDED_LAYERS, TEXT_TAPS, TextEncoderDims, needed_tensors
from ..toolkit.embeddings import Embeddings
from ..toolkit.igniter import open_model, strip_prefix
from .cached_clip import CachedCLIP, encoder_name
from .deliver import deliver, upload
from .residency import ResidentPatcher
from .text_engine import TextEngine
from .warmup import unset, warm_up
from .weights import assign, read_quantisation, remember_origin, weight_dtype

CHECKPOINT_PREFIX = r"text_encoders\.[^.]+\.transformer\."
PAD_TOKEN = 151643
ENCODER = "qwen3_4b"  # the host's name for this encoder, whatever its width
log = logging.getLogger("ark")
_tokenizer_lock = threading.Lock()  # two threads must not build it at once


def load_text_encoder(path: str | Path, ahead: bool = True) -> tuple[Any, TextEncoderDims]:
    """Build a CLIP from a Qwen3 file.

    Klein reads the output of layers 9, 18 and 27, so the layers above, the last norm and the language head are neither
    kept nor run.

    Args:
        path: safetensors, alone, in shards or in a checkpoint; bf16, fp16, fp32 or fp8.
        ahead: let the weights leave for the device at once, unless prompts of this encoder are kept on disk.

    Returns:
        The host's CLIP, which remembers its prompts, and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised in a way that is not supported.
    """
    name = Path(path).name
    opened = open_model(path)
    state_dict = opened.tensors
    state_dict = strip_prefix(state_dict, CHECKPOINT_PREFIX, "model.embed_tokens.weight")
    dims = TextEncoderDims.of(state_dict, name)
    state_dict, quantisation = read_quantisation(state_dict, opened.metadata, name)
    wanted = needed_tensors(state_dict)
    if quantisation is None:
        weight_dtype(state_dict, name)  # refuses what Klein does not run from
    device = comfy.model_management.text_encoder_device()
    embeddings = Embeddings(encoder_name(opened, device))
    # else its prompts are likely to be known, and the encoder is sent when one is not
    if ahead and not embeddings.any_saved():
        ResidentPatcher.send_ahead(opened, wanted, device)

    class Target:
        params: dict = {}  # noqa: RUF012 (the host's shape)
        clip = staticmethod(_text_encoder_class())
        tokenizer = staticmethod(klein_tokenizer)

    dtype = wanted["model.layers.0.input_layernorm.weight"].dtype  # never quantised
    options = _options(dims, dtype) | _quantisation_options(quantisation)
    if quantisation is None:
        shape = (dims, options["dtype"])
        warm_up("text encoder", shape, device, lambda: _encode_shallow(options, wanted, device))
    clip = comfy.sd.CLIP(
        Target,
        model_options=options,
        **_plain_patcher(),
    )
    transformer = getattr(clip.cond_stage_model, ENCODER).transformer
    transformer.model.norm = None  # the last tap is read before any norm
    assign(transformer, wanted, name)
    clip.patcher = ResidentPatcher.of(clip.patcher, opened)
    getattr(clip.cond_stage_model, ENCODER).engine = TextEngine(clip.patcher.masters)
    remember_origin(clip.patcher, lambda file: load_text_encoder(file)[0].patcher, path)
    return CachedCLIP.of(clip, embeddings), dims


def _options(dims: TextEncoderDims, dtype: torch.dtype) -> dict[str, Any]:
    """What the host's text model calls its dimensions."""
    size = {
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": NEEDED_LAYERS,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_key_value_heads,
    }
    return {"initial_device": torch.device("meta"), "dtype": dtype, f"{ENCODER}_model_config": size}


def _encode_shallow(options: dict[str, Any], weights: dict, device: torch.device) -> None:
    """A full prompt through three layers with weights that nobody has set."""
    size = f"{ENCODER}_model_config"
    options = {**options, size: {**options[size], "num_hidden_layers": 3}}
    encoder = _text_encoder_class(taps=(1, 2, 3))(
        device=torch.device("meta"), dtype=options["dtype"], model_options=options
    )
    transformer = getattr(encoder, ENCODER).transformer
    getattr(encoder, ENCODER).engine = TextEngine()
    transformer.model.norm = None
    assign(transformer, unset(needed_tensors(weights, 3), device), "the text encoder")
    encoder.set_clip_options({"execution_device": device})
    encoder.encode_token_weights({ENCODER: [[(0, 1.0)] * 512]})


def _plain_patcher() -> dict[str, bool]:
    """What keeps newer hosts from building a patcher with dynamic VRAM, which is replaced at once."""
    known = inspect.signature(comfy.sd.CLIP.__init__).parameters
    return {"disable_dynamic": True} if "disable_dynamic" in known else {}


def _quantisation_options(quantisation: Any) -> dict[str, Any]:
    """What the host's text model calls the configuration that `read_quantisation` found."""
    if quantisation is None:
        return {}
    if isinstance(quantisation, torch.dtype):
        return {"scaled_fp8": quantisation}
    if "mixed_ops" in quantisation:
        return {"quantization_metadata": quantisation}
    return {"quantization_metadata": json.dumps({"layers": quantisation})}


def klein_tokenizer(**_: Any) -> Any:
    """Klein's tokenizer, one for all: it takes half a second to build, longer than the weights take to arrive."""
    with _tokenizer_lock:
        return _build_tokenizer(tuple(folder_paths.get_folder_paths("embeddings")))


@functools.lru_cache(maxsize=1)
def _build_tokenizer(embeddings: tuple[str, ...]) -> Any:
    return _tokenizer_class()(
        embedding_directory=list(embeddings), tokenizer_data={f"{ENCODER}_min_length": 512}
    )


def _tokenizer_class() -> type:
    """Klein's tokenizer: the host's own where it has one."""
    flux = comfy.text_encoders.flux
    if hasattr(flux, "KleinTokenizer"):
        return flux.KleinTokenizer

    class KleinTokenizer(sd1_clip.SD1Tokenizer):
        # this host's vocabulary names the ids of <think> and </think> <|meta|> and <|endofmeta|>
        template = (
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|meta|>\n\n<|endofmeta|>\n\n"
        )

        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                name=ENCODER,
                tokenizer=comfy.text_encoders.z_image.Qwen3Tokenizer,
            )

        def tokenize_with_weights(self, text, return_word_ids=False, llama_template=None, **kwargs):
            framed = (llama_template or self.template).format(text)
            return super().tokenize_with_weights(
                framed, return_word_ids=return_word_ids, disable_weights=True, **kwargs
            )

    return KleinTokenizer


def brought(conditioning: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, None, dict]:
    """What the host's text encoders give, where the host wants it."""
    device = comfy.model_management.intermediate_device()
    others = {"attention_mask": deliver(mask, device)}
    return deliver(conditioning, device, wanted_there=True), None, others


def embed_tokens(encoder: Any, tokens: list[list], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As the host's `process_tokens`, which goes through them one by one.

    Args:
        encoder: the host's SDClipModel of Klein.
        tokens: a list of ids for each section, all of one length; embeddings of a user's file among them.
        device: where to.

    Returns:
        [B, seq_len, C] fp32, and the mask [B, seq_len], which may lie on the CPU: who wants it there does not wait then.
    """
    if not all({*map(type, section)} == {int} and section[0] != PAD_TOKEN for section in tokens):
        return encoder.process_tokens(tokens, device)[:2]
    ends = torch.tensor([(*section, PAD_TOKEN).index(PAD_TOKEN) for section in tokens])
    # out of an array, as torch goes through a list slowly; the upload waits for nothing that the device is at
    ids = upload(torch.frombuffer(array("q", chain(*tokens)), dtype=torch.int64).view(len(tokens), -1), device)  # fmt: skip
    embeds = encoder.transformer.get_input_embeddings()(ids, out_dtype=torch.float32)
    present = torch.arange(ids.shape[1]) < ends[:, None]
    return embeds, present.long()


def _qwen3_class(taps: tuple[int, ...]) -> type:
    """Qwen3 with some taps, the same on both hosts; its engine is set on the object."""

    class KleinQwen3(sd1_clip.SDClipModel):
        engine = None  # set on the object

        def forward(self, tokens):
            layers = self.engine and self.engine.layers(self.transformer.model)
            if (found := self.taps_of(tokens, layers)) is None:
                return super().forward(tokens)
            states, present = found
            return states.transpose(1, 2), None, {"attention_mask": present}

        def taps_of(self, tokens, layers, record=True):
            """[B, seq_len, taps, C] fp32 and the mask [B, seq_len] by the engine; None if it has no layers, or will not."""
            if not layers:
                return None
            device = layers[0].k.device
            embeds, present = embed_tokens(self, tokens, device)
            given = layers, embeds, upload(present, device), taps
            if not record and not self.engine.settled(*given):
                return None
            return self.engine.run(*given), present

        def __init__(self, device="cpu", dtype=None, model_options=None, **_):
            super().__init__(
                device=device,
                layer=list(taps),
                layer_idx=None,
                textmodel_json_config={},
                dtype=dtype,
                special_tokens={"pad": PAD_TOKEN},
                layer_norm_hidden_state=False,
                model_class=comfy.text_encoders.llama.Qwen3_4B,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    return KleinQwen3


def _text_encoder_class(taps: tuple[int, ...] = TEXT_TAPS) -> type:
    """The host's text encoder around Qwen3 with Klein's three taps."""

    class KleinTextEncoder(comfy.text_encoders.flux.Flux2TEModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                model_options=model_options or {},
                name=ENCODER,
                clip_model=_qwen3_class(taps),
            )

        @property
        def engine(self):
            return getattr(self, ENCODER).engine

        def encode_token_weights(self, token_weight_pairs):
            encoder = getattr(self, ENCODER)
            layers = self.engine and self.engine.layers(encoder.transformer.model)
            found = self.by_engine(token_weight_pairs, layers)
            if found is None:
                return super().encode_token_weights(token_weight_pairs)
            return brought(*found)

        def ask_for(self, token_weight_pairs):
            """Let the device encode them, for who holds the engine's lock; None where it is not ready.

            What is still to be recorded is left to the prompt itself, which would otherwise never come to that.

            Returns:
                What waits for it, and gives what `encode_token_weights` does.
            """
            encoder = getattr(self, ENCODER)
            layers = self.engine.layers_now(encoder.transformer.model)
            found = self.by_engine(token_weight_pairs, layers, record=False)
            return None if found is None else functools.partial(brought, *found)

        def by_engine(self, token_weight_pairs, layers, record=True):
            sections = token_weight_pairs[ENCODER]
            # a weight needs the host's arithmetic; Klein's tokenizer makes none
            if not sections or any(pair[1] != 1.0 for section in sections for pair in section):
                return None
            tokens = [[pair[0] for pair in section] for section in sections]
            found = getattr(self, ENCODER).taps_of(tokens, layers, record)
            if found is None:
                return None
            states, present = found
            # [B, seq_len, taps, C] to [1, B * seq_len, taps * C], all of it in place
            return states.flatten(2).flatten(0, 1).unsqueeze(0), present.flatten()[None]

    return KleinTextEncoder
