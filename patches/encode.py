"""A prompt to Klein's conditioning, by the pipeline's own tokenizer and text encoder, recorded as a CUDA graph.

transformers asks the processor for each of a thousand small kernels, which takes longer than they do. What is recorded is
its own forward; what it decides by numbers (which mask is needed) is decided before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from ..toolkit.architecture import TEXT_TAPS
from ..toolkit.fused.graph import Graphs

KEPT = 16  # conditionings of the last prompts, 8 MB each


class PromptEncoder:
    """Encodes prompts for one pipeline, and remembers the last ones.

    Args:
        pipeline: a `Flux2KleinPipeline`.
    """

    def __init__(self, pipeline: Any):
        self._pipeline, self.graphs = pipeline, Graphs()
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, prompt: str) -> torch.Tensor:
        """The conditioning, [1, 512, 3 * hidden] in the text encoder's dtype and on its device."""
        if prompt in self._known:
            self._known.move_to_end(prompt)
            return self._known[prompt]
        if self._pipeline.text_encoder.config._attn_implementation == "sdpa":
            embeds = self._encode(*self._tokens(prompt))
        else:  # it reads masks of another kind
            embeds = self._pipeline.encode_prompt(prompt)[0]
        self._known[prompt] = embeds
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return embeds

    def _tokens(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, each [1, 512], as the pipeline makes them."""
        tokenizer = self._pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )  # fmt: skip
        length = self._pipeline.tokenizer_max_length
        found = tokenizer(text, return_tensors="pt", padding="max_length", truncation=True, max_length=length)  # fmt: skip
        device = self._pipeline.text_encoder.device
        return found["input_ids"].to(device), found["attention_mask"].to(device)

    def _encode(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        encoder = self._pipeline.text_encoder

        def work(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            length = ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            masks = {"full_attention": causal & mask.bool()[:, None, None, :]}  # [1, 1, 512, 512]
            found = encoder(input_ids=ids, attention_mask=masks, output_hidden_states=True, use_cache=False)  # fmt: skip
            return torch.cat([found.hidden_states[tap] for tap in TEXT_TAPS], -1)

        key = tuple(weight.data_ptr() for weight in encoder.parameters())
        return self.graphs.run(key, work, ids, mask)
