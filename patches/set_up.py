"""What diffusers' pipeline prepares for each picture anew, remembered where it is needed.

The positions of tokens and the noise levels are the same for all pictures of a size. To bring them to a GPU the pipeline
waits until the text encoder is through; while it does not, its preparations cost nothing. On the objects, removable.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

KEPT = 8  # sizes
STATE = "timesteps", "sigmas", "num_inference_steps", "_step_index", "_begin_index"


def attach_set_up(pipeline: Any) -> Callable[[], None]:
    """Let a `Flux2KleinPipeline` remember positions and noise levels; the result undoes it."""
    made = [
        (pipeline, "_prepare_text_ids", _text_ids),
        (pipeline, "_prepare_latent_ids", _latent_ids),
        (pipeline.scheduler, "set_timesteps", _timesteps),
    ]
    attached = []
    for owner, name, make in made:
        if hasattr(type(owner), name) and name not in vars(owner):
            setattr(owner, name, make(owner, getattr(type(owner), name)))
            attached.append((owner, name, vars(owner)[name]))

    def remove() -> None:
        for owner, name, mine in attached:
            if vars(owner).get(name) is mine:
                delattr(owner, name)

    return remove


def _remember() -> Callable[[Hashable, Callable[[], Any]], Any]:
    """A function that makes things once for each key; the last ones are kept."""
    known: OrderedDict[Hashable, Any] = OrderedDict()

    def get(key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        known.move_to_end(key)
        while len(known) > KEPT:
            known.popitem(last=False)
        return known[key]

    return get


def _text_ids(_: Any, own: Callable) -> Callable:
    get = _remember()

    def text_ids(x: torch.Tensor, t_coord: torch.Tensor | None = None) -> torch.Tensor:
        if t_coord is not None:
            return own(x, t_coord)
        return get((x.shape[:2], x.device), lambda: own(x).to(x.device))

    return text_ids


def _latent_ids(_: Any, own: Callable) -> Callable:
    get = _remember()

    def latent_ids(latents: torch.Tensor) -> torch.Tensor:
        return get((latents.shape, latents.device), lambda: own(latents).to(latents.device))

    return latent_ids


def _timesteps(scheduler: Any, own: Callable) -> Callable:
    get = _remember()

    @functools.wraps(own)  # the pipeline looks which arguments there are
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None, timesteps: Any = None) -> None:  # fmt: skip
        def make() -> dict[str, Any]:
            own(scheduler, num_inference_steps, device, sigmas, mu, timesteps)
            return {name: getattr(scheduler, name) for name in STATE if hasattr(scheduler, name)}

        if sigmas is None or timesteps is not None:
            make()
            return
        key = num_inference_steps, str(device), tuple(map(float, sigmas)), mu, getattr(scheduler, "shift", None)  # fmt: skip
        for name, value in get(key, make).items():
            setattr(scheduler, name, value)

    return set_timesteps
