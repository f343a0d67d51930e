"""A ModelPatcher whose weights come from their file and never go back.

Loading copies from file to device in large pieces, unloading drops the device's copy. All else (LoRA, partial loading,
object patches) is the host's.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.cli_args import args

from ..toolkit.ahead import send_ahead, take_ahead
from ..toolkit.errors import TransferFailed
from ..toolkit.igniter import OpenedModel
from ..toolkit.paths import mmap_pin
from .masters import Masters, lasting, put, weights_of
from .progress import Progress

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])  # as the host keeps them
log = logging.getLogger("ark")
if args.disable_pinned_memory:
    mmap_pin.forbid()


class ResidentPatcher(comfy.model_patcher.ModelPatcher):
    """The host's plain ModelPatcher with `Masters` on its model, shared by all clones."""

    fast_devices = ("cuda",)

    @classmethod
    def of(
        cls, patcher: Any, opened: OpenedModel, dtype: torch.dtype | None = None
    ) -> ResidentPatcher:
        """Make one in place of a patcher that the host built around the same model; see `Masters` for `dtype`."""
        made = cls(
            patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device
        )
        for name in ("object_patches", "force_cast_weights", "hook_mode", "is_clip"):
            setattr(made, name, getattr(patcher, name))
        patcher.model.ark_masters = Masters(patcher.model, opened, dtype)
        if dtype:  # the host would count what the file has
            made.size = sum(
                weight.numel() * (dtype if weight.is_floating_point() else weight.dtype).itemsize
                for weight in weights_of(patcher.model).values()
            )
        return made

    @classmethod
    def send_ahead(
        cls,
        opened: OpenedModel,
        state_dict: dict[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        """Let the weights leave for a fast device while their module is still to be built."""
        if device.type in cls.fast_devices and (
            reason := send_ahead(opened, state_dict.values(), device)
        ):
            log.info("Ark igniter: the weights are sent when they are needed (%s).", reason)

    def lead(self, follower: ResidentPatcher) -> None:
        """Let another model's weights leave whenever this one is loaded: what it computes is meant for that one."""
        self.masters.follower = weakref.ref(follower.model)

    def send_follower(self) -> None:
        """Let that other model's weights leave although this one is not loaded, because nobody needs it."""
        follower = self.masters.follower()
        if follower is not None and self.load_device.type in self.fast_devices:
            follower.ark_masters.send_ahead(follower, self.load_device)

    @property
    def masters(self) -> Masters:
        """Of the model."""
        return self.model.ark_masters

    def is_loaded(self) -> bool:
        """Whether all of it lies on the device as this patcher wants it, known to the host.

        To let the host load it would change nothing then but ask for free memory, several times: over a millisecond.
        """
        model = self.model
        return (
            model.current_weight_patches_uuid == self.patches_uuid
            and not model.model_lowvram
            and model.device == self.load_device
            and any(loaded.model is self for loaded in comfy.model_management.current_loaded_models)
            and self.loaded_size() > 0
        )

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
    ):
        """Load as the host does, after the weights were sent to where it wants them."""
        fast = device_to is not None and device_to.type in self.fast_devices
        self.masters.changed()
        if fast and not full_load:
            take_ahead(self.masters.opened, device_to)  # there is no room for it
        if fast and full_load:
            try:
                with Progress(type(self.model).__name__) as progress:
                    self.masters.send(self.model, device_to, set(self.patches), progress.watch)
                self._mark_arrived(device_to)
            # RuntimeError is CUDA's, out of memory too
            except (TransferFailed, RuntimeError) as error:
                log.warning("Ark igniter: ComfyUI copies the weights itself (%s).", error)
            except comfy.model_management.InterruptProcessingException:
                self.detach()  # newer hosts do not, as theirs is no Exception
                raise
        self.masters.cast_at_home(self.model)
        # what fits comes at the speed of the link, the rest is read from there at each step
        if fast and not full_load:
            for key in self.masters.at_home(self.model) & self.masters.origins.keys():
                self.masters.pin(self.model, key, device_to)
        self.masters.released.clear()
        self.masters.patched = self.backup
        return super().load(
            device_to,
            lowvram_model_memory=lowvram_model_memory,
            force_patch_weights=force_patch_weights,
            full_load=full_load,
        )

    def _mark_arrived(self, device: torch.device) -> None:
        """Spare the host looking after modules that are complete: it waits for the whole device at each of them."""
        patched = {key.rpartition(".")[0] for key in self.patches}
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and name not in patched and all(weight.device == device for weight in own):
                module.comfy_patched_weights = True

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, *rest, **named):
        """Patch as the host does, but keep the file's view as the backup, and never write into it."""
        wanted_back = named.get("return_weight") or any(rest[:1])
        if key in self.patches and key not in self.backup and not wanted_back:
            home = self.masters.homes.get(key)
            if home is not None:
                self.backup[key] = Backup(home, False)
        weight = self.masters.homes.get(key)
        with lasting(weight), torch.no_grad():  # else compiled code would start anew
            return super().patch_weight_to_device(key, device_to, False, *rest, **named)

    def pin_weight_to_device(self, key):
        """Pin a weight that stays off the device: the host's way would copy it out of the file."""
        if key not in self.masters.origins:
            return super().pin_weight_to_device(key)
        return self.masters.pin(self.model, key, self.load_device)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *rest, **named):
        """Patch as the host does; it writes in place."""
        self._before_writing(key)
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *rest, **named)

    def patch_cached_hook_weights(self, cached_weights, key, *rest, **named):
        """Patch as the host does; it writes in place."""
        self._before_writing(key)
        return super().patch_cached_hook_weights(cached_weights, key, *rest, **named)

    def unpatch_hooks(self, *args, **named):
        """Undo as the host does; it writes in place."""
        if self.hook_backup:
            self.masters.changed()
        return super().unpatch_hooks(*args, **named)

    def _before_writing(self, key: str) -> None:
        """Let a weight lie where writing to it counts, until the host has put it right again."""
        self.masters.changed()
        self.masters.bring_back(self.model, self.load_device)
        self.masters.make_writable(self.model, key)
        self.masters.hooked = self.hook_backup

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        """Unload as the host does, without copying back what the file has."""
        if unpatch_weights:
            self.masters.changed()
        if unpatch_weights and device_to is not None and device_to.type == "cpu":
            self.eject_model()
            self.unpatch_hooks()  # it writes into the weights: not into what is at home
            self.masters.recall(self.model)
        return super().unpatch_model(device_to, unpatch_weights=unpatch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Free some memory; what leaves is dropped, not copied back.

        A flat buffer is given up whole, then what fits is loaded by the host, module by module.
        """
        self.masters.changed()  # who refers to what leaves would keep it on the device
        away = self.masters.homes.keys() - self.masters.at_home(self.model)
        if self.model.model_lowvram or not away:
            with self._dropping(away):
                freed = super().partially_unload(device_to, memory_to_free, force_patch_weights)
            self.masters.cast_at_home(self.model)
            return freed
        before = self.loaded_size()
        fits = 1 if self.masters.released else max(1, before - memory_to_free)
        self.unpatch_model(device_to)
        self.patch_model(
            self.load_device,
            lowvram_model_memory=fits,
            force_patch_weights=force_patch_weights,
        )
        return before - self.loaded_size()

    @contextlib.contextmanager
    def _dropping(self, keys: set[str]) -> Iterator[None]:
        """Let `module.to(cpu)` give some weights their place at home, in place of a copy of what the device has."""
        parts = collections.defaultdict(list)
        for key in keys:
            parts[self.model.get_submodule(key.rpartition(".")[0])].append(key)
        for part, own in parts.items():
            part.to = functools.partial(self._move, part, own)  # on the object, for this call
        try:
            yield
        finally:
            for part in parts:
                del part.to

    def _move(self, part: torch.nn.Module, keys: list[str], device: torch.device) -> torch.nn.Module:  # fmt: skip
        if device.type == "cpu":
            for key in keys:
                put(self.model, key, self.masters.homes[key])
        return type(part).to(part, device)
