"""A model that lies on the device, and has the memory of this very run in a recording, is not loaded again before it samples.

To load it the host would change nothing, but ask the driver several times how much memory is free: over a millisecond, in
which the device has nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch

from .fused import engine_on
from .references import REFERENCES
from .residency import ResidentPatcher

PREPARE_SAMPLING = "prepare_sampling"  # the host's WrappersMP.PREPARE_SAMPLING
KEY = "ark_stay"
# of a conditioning of the whole picture
KNOWN = {"model_conds", "uuid", "cross_attn", "pooled_output", "attention_mask", REFERENCES}


def ready_again(model: Any, shape: Sequence[int], guider: Any) -> bool:
    """Whether a run needs nothing that is not there; a run that is not is expected to make it so, for the next one.

    Args:
        model: the host's ModelPatcher.
        shape: of the noise.
        guider: the host's; whatever its conditionings have beside text and references may need models of its own.
    """
    engine = engine_on(model)
    if engine is None or not isinstance(model, ResidentPatcher):
        return False
    if model.model_patches_models() or model.get_nested_additional_models():
        return False
    given = [cond for found in guider.original_conds.values() for cond in found]
    if any(cond.keys() - KNOWN for cond in given):
        return False
    form = guider.cfg, tuple(shape), *(_shapes(cond.get(name)) for cond in given for name in ("cross_attn", REFERENCES))  # fmt: skip
    before, engine.form = engine.form, form
    runner = engine.runner  # with a reason the host's own forward may run, which needs more memory
    return before == form and runner.graphs.recorded > 0 and not runner.reasons and model.is_loaded()  # fmt: skip


def stay(guider: Any) -> None:
    """Let a guider of the host leave out the loading."""

    def prepare(executor: Any, model: Any, shape: Any, conds: Any, *args: Any, **named: Any) -> tuple[Any, Any, list]:  # fmt: skip
        return model.model, conds, []

    guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
    comfy.patcher_extension.add_wrapper_with_key(PREPARE_SAMPLING, KEY, prepare, guider.model_options, is_model_options=True)  # fmt: skip


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return [_shapes(each) for each in value] if isinstance(value, list) else None
