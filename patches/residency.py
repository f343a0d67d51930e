"""A ModelPatcher whose weights come from their file and never go back.

Loading copies from file to device in large pieces, unloading drops the device's copy. All else (LoRA, partial loading,
object patches) is the host's.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.cli_args import args

from ..toolkit.ahead import Sending, send, send_ahead, take_ahead, wait_for
from ..toolkit.errors import TransferFailed
from ..toolkit.header import ModelFile, TensorEntry
from ..toolkit.igniter import OpenedModel
from ..toolkit.paths import mmap_pin
from .progress import Progress

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])  # as the host keeps them
log = logging.getLogger("ark")
if args.disable_pinned_memory:
    mmap_pin.forbid()


class Watcher(Protocol):
    """Who makes something of a model's weights."""

    def weights_changed(self) -> None:
        """Forget it: they lie elsewhere now, or are others."""


class Masters:
    """Where each weight of a module comes from: a view of its file, which is the weight's home.

    Args:
        module: the host's, its weights assigned from `opened`.
        opened: the model whose files they come from. Weights that were computed since have no home and stay the host's.
        dtype: what floating-point weights become where they are used; None if that is what the file has.
    """

    def __init__(
        self, module: torch.nn.Module, opened: OpenedModel, dtype: torch.dtype | None = None
    ):
        self.opened, self.dtype = opened, dtype
        self.homes: dict[str, torch.Tensor] = {}
        self.origins: dict[str, tuple[ModelFile, TensorEntry]] = {}
        self.pinned: dict[tuple, torch.Tensor | None] = {}  # files in pinned memory, by identity
        self.follower: Callable[[], Any] = lambda: None  # see `ResidentPatcher.lead`
        self.released: set[str] = set()  # at home, though the host takes them to be on the device
        self.patched: Mapping[str, Any] = {}  # by key, what the host has to restore
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        for key, weight in _weights(module).items():
            if origin := opened.origin_of(_stored(weight)):
                self.homes[key] = weight.detach()
                if origin[0].identity in opened.mapped:
                    self.origins[key] = origin
        for file, _ in opened.parts:
            mmap_pin.hold(file.identity)
            weakref.finalize(self, mmap_pin.forget, file.identity).atexit = False

    def at_home(self, module: torch.nn.Module) -> set[str]:
        """The keys of the weights that are views of their file now."""
        now = _weights(module)
        return {
            key
            for key, home in self.homes.items()
            if key in now and _stored(now[key]).data_ptr() == _stored(home).data_ptr()
        }

    def send(
        self,
        module: torch.nn.Module,
        device: torch.device,
        apart: set[str],
        watch: Callable[[int, int], None] = lambda moved, total: None,
    ) -> None:
        """Bring the weights that are at home in a mapped file to the device, one flat buffer a file.

        A file that was read whole is small, and may be another by now: its weights are the host's to copy.

        Args:
            module: the one that this was made for.
            device: where to.
            apart: keys that get a buffer of their own, as they will soon be replaced (LoRA): it is freed then.
            watch: called several times a second with the bytes that have left, and all that will.

        Raises:
            TransferFailed, RuntimeError: no path serves, or the device has no room; weights that were not sent are
                still at home.
            ModelFileError: a file has changed.
        """
        ahead = take_ahead(self.opened, device)
        travelling: dict[int, tuple[Sending, list[str]]] = {}
        groups: dict[tuple, dict[int, TensorEntry]] = collections.defaultdict(dict)
        keys: dict[tuple, list[str]] = collections.defaultdict(list)
        for key in self.at_home(module) & self.origins.keys():
            file, entry = self.origins[key]
            sending = ahead.get(file.identity)
            if sending and sending.layout.entries.get(entry.start) == entry:
                travelling.setdefault(id(sending), (sending, []))[1].append(key)
            else:
                groups[file.identity, key in apart][entry.start] = entry
                keys[file.identity, key in apart].append(key)
        files = {file.identity: file for file, _ in self.opened.parts}
        for group, entries in groups.items():
            sending = send(self.opened, files[group[0]], entries, device)
            travelling[id(sending)] = (sending, keys[group])
        if (follower := self.follower()) is not None:
            follower.ark_masters.send_ahead(follower, device)
        total = sum(sending.layout.nbytes for sending, _ in travelling.values())
        try:
            sendings = [sending for sending, _ in travelling.values()]
            wait_for(sendings, lambda moved: watch(moved, total))
        except BaseException:  # the user's interrupt: what is on its way serves the next run
            for identity, sending in ahead.items():
                self.opened.ahead[identity, device] = sending
            raise
        failure = None
        for sending, names in travelling.values():
            try:
                arrived = sending.arrived.result()
            except (TransferFailed, RuntimeError) as error:
                failure = error
                continue
            for key in names:
                weight = arrived[self.origins[key][1].start]
                if apart and key not in apart and sending in ahead.values():
                    weight = weight.clone()  # so that the flat buffer goes when those apart do
                with _lasting(self.homes[key]):
                    _set(module, key, self.cast(_with_stored(self.homes[key], weight)))
        if failure:
            raise failure

    def send_ahead(self, module: torch.nn.Module, device: torch.device) -> None:
        """Let the weights leave before anybody asks for them, if all of them are at home and none is on its way."""
        if not self.opened.ahead and self.at_home(module) == self.homes.keys():
            send_ahead(self.opened, map(_stored, self.homes.values()), device)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight in the dtype that it is used in, computed where it lies."""
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def cast_at_home(self, module: torch.nn.Module) -> None:
        """Cast what was not sent, so that the host copies it in the right dtype."""
        if self.dtype:
            for key in self.at_home(module):
                with torch.inference_mode(False):
                    _set(module, key, self.cast(self.homes[key]))

    def make_writable(self, module: torch.nn.Module, key: str) -> None:
        """Let a weight that lies in read-only pinned memory lie at home again, where writing is private."""
        now = _stored(operator.attrgetter(key)(module)) if key in self.origins else None
        flat = self.pinned.get(self.origins[key][0].identity) if now is not None else None
        if flat is not None and 0 <= now.data_ptr() - flat.data_ptr() < flat.numel():
            _set(module, key, self.homes[key])

    def pin(self, module: torch.nn.Module, key: str, device: torch.device) -> None:
        """Make a weight that is at home a view of its file in pinned memory."""
        home = self.homes[key]
        if _stored(operator.attrgetter(key)(module)).data_ptr() != _stored(home).data_ptr():
            return
        file, entry = self.origins[key]
        if file.identity not in self.pinned:
            self.pinned[file.identity] = mmap_pin.pinned_bytes(file, device)
        flat = self.pinned[file.identity]
        if flat is not None:
            with torch.inference_mode(False):
                data = flat[entry.start : entry.start + entry.nbytes]
                data = data.view(entry.dtype).view(entry.shape)
                _set(module, key, _with_stored(home, data))

    def changed(self) -> None:
        """Tell who made something of the weights that they lie elsewhere now, or are others."""
        for watcher in list(self.watchers):
            watcher.weights_changed()

    def release(self, module: torch.nn.Module, keys: Iterable[str]) -> None:
        """Give up the device's copies of weights that nothing will read there; patched ones stay. See `bring_back`."""
        now = _weights(module)
        going = (set(keys) & self.origins.keys()) - self.at_home(module) - self.patched.keys()
        buffers = {_stored(now[key]).untyped_storage().data_ptr() for key in going}
        for key in self.homes.keys() - going:
            if _stored(now[key]).untyped_storage().data_ptr() in buffers:
                with _lasting(self.homes[key]):  # of its own, so that the flat buffer goes
                    _set(module, key, _with_stored(now[key], _stored(now[key]).clone()))
        for key in going:
            _set(module, key, self.homes[key])
        self.released |= going

    def bring_back(self, module: torch.nn.Module, device: torch.device) -> None:
        """Undo `release`; raises what `send` does."""
        if self.released:
            self.send(module, device, set())
            self.released.clear()

    def recall(self, module: torch.nn.Module) -> None:
        """Make every weight a view of its file again; what was on the device is dropped, nothing is copied back."""
        self.pinned.clear()
        self.released.clear()
        for key in self.homes.keys() - self.at_home(module):
            _set(module, key, self.homes[key])


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
                for weight in _weights(patcher.model).values()
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
        with _lasting(weight), torch.no_grad():  # else compiled code would start anew
            return super().patch_weight_to_device(key, device_to, False, *rest, **named)

    def pin_weight_to_device(self, key):
        """Pin a weight that stays off the device: the host's way would copy it out of the file."""
        if key not in self.masters.origins:
            return super().pin_weight_to_device(key)
        return self.masters.pin(self.model, key, self.load_device)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *rest):
        """Patch as the host does; it writes in place."""
        self.masters.changed()
        self.masters.make_writable(self.model, key)
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *rest)

    def patch_cached_hook_weights(self, cached_weights, key, *rest):
        """Patch as the host does; it writes in place."""
        self.masters.changed()
        self.masters.make_writable(self.model, key)
        return super().patch_cached_hook_weights(cached_weights, key, *rest)

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
                _set(self.model, key, self.masters.homes[key])
        return type(part).to(part, device)


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _stored(weight: torch.Tensor) -> torch.Tensor:
    """What a weight's bytes are: of one that the host quantised the tensor inside, else itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight
    names, _ = weight.__tensor_flatten__()
    return max((getattr(weight, name) for name in names), key=lambda inner: inner.nbytes)


def _with_stored(weight: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The same weight with its bytes elsewhere; a quantised one takes its scales with it."""
    if not hasattr(weight, "__tensor_flatten__"):
        return stored
    names, context = weight.__tensor_flatten__()
    old = _stored(weight)
    inner = {name: getattr(weight, name) for name in names}
    moved = {name: stored if t is old else t.to(stored.device) for name, t in inner.items()}
    return type(weight).__tensor_unflatten__(moved, context, weight.shape, weight.stride())


def _lasting(weight: torch.Tensor | None) -> contextlib.AbstractContextManager:
    """Weights outlive the prompt, so they are made outside its inference mode; the host's quantised ones cannot be."""
    quantised = hasattr(weight, "__tensor_flatten__")
    return contextlib.nullcontext() if quantised else torch.inference_mode(False)


def _set(module: torch.nn.Module, key: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._buffers:
        part._buffers[leaf] = tensor
    else:
        setattr(part, leaf, torch.nn.Parameter(tensor, requires_grad=False))
