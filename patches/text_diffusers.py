"""The text encoder of a diffusers pipeline in Ark's engine: on the object, removable, the libraries untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..toolkit.architecture import HEAD_DIM, TEXT_TAPS
from ..toolkit.fused.runner import Unknown
from ..toolkit.qwen3 import THETA
from ..toolkit.sources import Sources
from ..toolkit.text_engine import HOOKS, TextEngine

OTHER = "it is not Qwen3 as Klein has it"
METHOD = "_get_qwen3_prompt_embeds"  # by which the pipeline makes conditioning of texts


class PipelineTextEngine(TextEngine):
    """Runs the layers of transformers' Qwen3."""

    observers = "transformers.utils.output_capturing"  # which stay on a model that was asked for hidden states

    def __init__(self) -> None:
        super().__init__("transformers'")
        self._sources: Sources | None = None

    def check(self, model: Any) -> None:
        """Raise Unknown for what may change between two calls; forget weights that have."""
        super().check(model)
        if self._sources is not None and self._sources.same():
            return
        self.weights_changed()
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        found = (
            *(getattr(config, name, None) for name in ("model_type", "head_dim", "hidden_act")),
            *(rope.get(name) for name in ("rope_type", "rope_theta")),
        )
        if found != ("qwen3", HEAD_DIM, "silu", "default", THETA) or config.use_sliding_window:
            raise Unknown(OTHER)
        self._sources = Sources(model.layers)

    def ready(self, encoder: Any) -> bool:
        """Whether the engine runs this pipeline's encoder; the log says why not, once."""
        model = getattr(encoder, "model", encoder)  # under a language model's head
        if not isinstance(getattr(model, "layers", None), torch.nn.ModuleList):
            self.refuse(OTHER)
            return False
        if self.hooked(encoder) or self.hooked(model.embed_tokens):
            self.refuse(HOOKS)
            return False
        return self.layers(model) is not None

    def embeds(self, encoder: Any, ids: torch.Tensor, mask: torch.Tensor, taps: Sequence[int]) -> torch.Tensor | None:  # fmt: skip
        """A pipeline's conditioning.

        Args:
            encoder: the pipeline's.
            ids: [B, seq_len] of the tokens.
            mask: [B, seq_len], 0 where nothing may look: padding, at the end.
            taps: after how many layers to read.

        Returns:
            [B, seq_len, len(taps) * C] fp32; None if transformers' forward has to run.
        """
        if not self.ready(encoder):
            return None
        model = getattr(encoder, "model", encoder)
        layers: Any = self._layers
        # transformers reads the last layer behind the last norm
        most = len(layers) - (not isinstance(model.norm, torch.nn.Identity))
        if sorted({*taps}) != list(taps) or not 0 < taps[0] <= taps[-1] <= most:
            self.refuse(f"layers {', '.join(map(str, taps))} are asked for")
            return None
        with torch.no_grad():
            return self.run(layers, model.embed_tokens(ids), mask, list(taps)).flatten(2)


def attach_text_encoder(pipeline: Any) -> tuple[PipelineTextEngine, Callable[[], None]]:
    """Let a pipeline's prompts be encoded by Ark's engine, if its text encoder fits; the engine's reasons say why not.

    Args:
        pipeline: a `Flux2KleinPipeline`, its text encoder on the device that it will run on.

    Returns:
        The engine, and a function that undoes it.
    """
    engine = PipelineTextEngine()
    own: Any = getattr(type(pipeline), METHOD, None)
    if own is None or METHOD in vars(pipeline):
        engine.refuse("the pipeline encodes prompts in another way")
    if engine.reasons or not engine.ready(pipeline.text_encoder):
        return engine, lambda: None

    def prompt_embeds(
        text_encoder: Any,
        tokenizer: Any,
        prompt: str | list[str],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        max_sequence_length: int = 512,
        hidden_states_layers: Sequence[int] = TEXT_TAPS,
    ) -> torch.Tensor:
        texts = [prompt] if isinstance(prompt, str) else prompt
        ids, mask = tokens(tokenizer, texts, max_sequence_length, text_encoder.device)
        found = engine.embeds(text_encoder, ids, mask, hidden_states_layers)
        if found is None:
            return own(text_encoder, tokenizer, prompt, dtype, device, max_sequence_length, hidden_states_layers)  # fmt: skip
        return found.to(device or text_encoder.device, dtype or text_encoder.dtype)

    def remove() -> None:
        if vars(pipeline).get(METHOD) is prompt_embeds:
            delattr(pipeline, METHOD)
        engine.weights_changed()

    setattr(pipeline, METHOD, prompt_embeds)
    return engine, remove


def tokens(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Ids and mask as the pipeline makes them.

    Args:
        tokenizer: the pipeline's.
        texts: the prompts.
        length: of each, padded or cut.
        device: where to.

    Returns:
        Each [B, length].
    """
    framed = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in texts
    ]  # fmt: skip
    found = tokenizer(framed, padding="max_length", truncation=True, max_length=length)
    both = torch.tensor(
        [found["input_ids"], found["attention_mask"]], device=device
    )  # brought at once
    return both[0], both[1]
