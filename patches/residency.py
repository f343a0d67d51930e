"""A ModelPatcher whose weights come from their file and never go back.

Loading copies from file to device in large pieces, unloading drops the device's copy. All else (LoRA, partial loading,
object patches) is the host's.
"""

from __future__ import annotations

import collections
import logging
import weakref
from typing import Any

import comfy.model_patcher
import torch

from ..toolkit.ahead import send_ahead, take_ahead
from ..toolkit.errors import TransferFailed
from ..toolkit.header import ModelFile, TensorEntry
from ..toolkit.igniter import OpenedModel
from ..toolkit.layout import plan_layout
from ..toolkit.paths import mmap_pin
from ..toolkit.transfer import transfer

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])  # as the host keeps them
log = logging.getLogger("ark")


class Masters:
    """Where each weight of a module comes from: a view of its file, which is the weight's home.

    Args:
        module: the host's, its weights assigned from `opened`.
        opened: the model whose files they come from. Weights that were computed since have no home and stay the host's.
    """

    def __init__(self, module: torch.nn.Module, opened: OpenedModel):
        self.opened = opened
        self.homes: dict[str, torch.Tensor] = {}
        self.origins: dict[str, tuple[ModelFile, TensorEntry]] = {}
        for key, tensor in _weights(module).items():
            if origin := opened.origin_of(tensor):
                self.homes[key] = tensor.data
                if origin[0].identity in opened.mapped:
                    self.origins[key] = origin
        for file, _ in opened.parts:
            weakref.finalize(self, mmap_pin.forget, file.identity).atexit = False

    def at_home(self, module: torch.nn.Module) -> set[str]:
        """The keys of the weights that are views of their file now."""
        now = _weights(module)
        return {
            key
            for key, home in self.homes.items()
            if key in now and now[key].data_ptr() == home.data_ptr()
        }

    def send(self, module: torch.nn.Module, device: torch.device, apart: set[str]) -> None:
        """Bring the weights that are at home in a mapped file to the device, one flat buffer a file.

        A file that was read whole is small, and may be another by now: its weights are the host's to copy.

        Args:
            module: the one that this was made for.
            device: where to.
            apart: keys that get a buffer of their own, as they will soon be replaced (LoRA): it is freed then.

        Raises:
            TransferFailed: no path serves; weights that were not sent are still at home.
            ModelFileError: a file has changed.
        """
        ahead = take_ahead(self.opened, device)
        groups: dict[tuple, dict[str, TensorEntry]] = collections.defaultdict(dict)
        for key in self.at_home(module) & self.origins.keys():
            file, entry = self.origins[key]
            sent = ahead.get(file.identity, {}).get(entry.start)
            if sent is not None and (sent.shape, sent.dtype) == (entry.shape, entry.dtype):
                _set(module, key, sent)
            else:
                groups[file.identity, key in apart][key] = entry
        files = {file.identity: file for file, _ in self.opened.parts}
        for (identity, _), entries in groups.items():
            layout = plan_layout(entries)
            with torch.inference_mode(False):  # weights outlive the prompt
                flat, _ = transfer(files[identity], layout, device)
                for key, tensor in layout.views(flat).items():
                    _set(module, key, tensor)

    def recall(self, module: torch.nn.Module) -> None:
        """Make every weight a view of its file again; what was on the device is dropped, nothing is copied back."""
        for key in self.homes.keys() - self.at_home(module):
            _set(module, key, self.homes[key])


class ResidentPatcher(comfy.model_patcher.ModelPatcher):
    """The host's plain ModelPatcher with `Masters` on its model, shared by all clones."""

    fast_devices = ("cuda",)

    @classmethod
    def of(cls, patcher: Any, opened: OpenedModel) -> ResidentPatcher:
        """Make one in place of a patcher that the host built around the same model."""
        made = cls(
            patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device
        )
        for name in ("object_patches", "force_cast_weights", "hook_mode", "is_clip"):
            setattr(made, name, getattr(patcher, name))
        patcher.model.ark_masters = Masters(patcher.model, opened)
        return made

    @classmethod
    def send_ahead(
        cls, opened: OpenedModel, state_dict: dict[str, torch.Tensor], device: torch.device
    ) -> None:
        """Let the weights leave for a fast device while their module is still to be built."""
        if device.type in cls.fast_devices and (
            reason := send_ahead(opened, state_dict.values(), device)
        ):
            log.info("Ark igniter: the weights are sent when they are needed (%s).", reason)

    @property
    def masters(self) -> Masters:
        """Of the model."""
        return self.model.ark_masters

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
    ):
        """Load as the host does, after the weights were sent to where it wants them."""
        if full_load and device_to is not None and device_to.type in self.fast_devices:
            try:
                self.masters.send(self.model, device_to, set(self.patches))
            except (
                TransferFailed,
                RuntimeError,
            ) as error:  # RuntimeError: CUDA's, out of memory too
                log.warning("Ark igniter: ComfyUI copies the weights itself (%s).", error)
        return super().load(
            device_to,
            lowvram_model_memory=lowvram_model_memory,
            force_patch_weights=force_patch_weights,
            full_load=full_load,
        )

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, *rest, **named):
        """Patch as the host does, but keep the file's view as the backup, and never write into it."""
        wanted_back = named.get("return_weight") or any(rest[:1])
        if key in self.patches and key not in self.backup and not wanted_back:
            home = self.masters.homes.get(key)
            if home is not None:
                self.backup[key] = Backup(home, False)
        return super().patch_weight_to_device(key, device_to, False, *rest, **named)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        """Unload as the host does, without copying back what the file has."""
        if unpatch_weights and device_to is not None and device_to.type == "cpu":
            self.masters.recall(self.model)
        return super().unpatch_model(device_to, unpatch_weights=unpatch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Free some memory: a flat buffer is given up whole, then what fits is loaded by the host, module by module."""
        away = self.masters.homes.keys() - self.masters.at_home(self.model)
        if self.model.model_lowvram or not away:
            return super().partially_unload(device_to, memory_to_free, force_patch_weights)
        before = self.loaded_size()
        self.unpatch_model(device_to)
        self.patch_model(
            self.load_device,
            lowvram_model_memory=max(1, before - memory_to_free),
            force_patch_weights=force_patch_weights,
        )
        return before - self.loaded_size()


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _set(module: torch.nn.Module, key: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._buffers:
        part._buffers[leaf] = tensor
    else:
        setattr(part, leaf, torch.nn.Parameter(tensor, requires_grad=False))
