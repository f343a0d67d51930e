"""Where each weight of a host's module comes from, and how it gets from there to the device: no copy is ever brought back."""

from __future__ import annotations

import collections
import contextlib
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

from ..toolkit.ahead import Sending, send, send_ahead, take_ahead, wait_for
from ..toolkit.errors import TransferFailed
from ..toolkit.header import ModelFile, TensorEntry
from ..toolkit.igniter import OpenedModel
from ..toolkit.paths import mmap_pin


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
        self.hooked: Mapping[str, Any] = {}  # the same, of the hooks of a conditioning
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        for key, weight in weights_of(module).items():
            if origin := opened.origin_of(stored_in(weight)):
                self.homes[key] = weight.detach()
                if origin[0].identity in opened.mapped:
                    self.origins[key] = origin
        for file, _ in opened.parts:
            mmap_pin.hold(file.identity)
            weakref.finalize(self, mmap_pin.forget, file.identity).atexit = False

    def at_home(self, module: torch.nn.Module) -> set[str]:
        """The keys of the weights that are views of their file now."""
        now = weights_of(module)
        return {
            key
            for key, home in self.homes.items()
            if key in now and stored_in(now[key]).data_ptr() == stored_in(home).data_ptr()
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
        travelling = self._depart(module, device, apart, ahead)
        if (follower := self.follower()) is not None:
            follower.ark_masters.send_ahead(follower, device)
        sendings = [sending for sending, _ in travelling]
        total = sum(sending.layout.nbytes for sending in sendings)
        try:
            wait_for(sendings, lambda moved: watch(moved, total))
        except BaseException:  # the user's interrupt: what is on its way serves the next run
            for identity, sending in ahead.items():
                self.opened.ahead[identity, device] = sending
            raise
        failure = None
        for sending, keys in travelling:
            try:
                arrived = sending.arrived.result()
            except (TransferFailed, RuntimeError) as error:
                failure = error
                continue
            for key in keys:
                weight = arrived[self.origins[key][1].start]
                if apart and key not in apart and sending in ahead.values():
                    weight = weight.clone()  # so that the flat buffer goes when those apart do
                with lasting(self.homes[key]):
                    put(module, key, self.cast(with_stored(self.homes[key], weight)))
        if failure:
            raise failure

    def _depart(self, module: torch.nn.Module, device: torch.device, apart: set[str], ahead: Mapping[tuple, Sending]) -> list[tuple[Sending, list[str]]]:  # fmt: skip
        """Send what is at home and not yet on its way `ahead`; everything that travels, with its keys."""
        travelling: dict[int, tuple[Sending, list[str]]] = {}
        groups: dict[tuple, dict[str, TensorEntry]] = collections.defaultdict(dict)
        for key in self.at_home(module) & self.origins.keys():
            file, entry = self.origins[key]
            sending = ahead.get(file.identity)
            if sending and sending.layout.entries.get(entry.start) == entry:
                travelling.setdefault(id(sending), (sending, []))[1].append(key)
            else:
                groups[file.identity, key in apart][key] = entry
        files = {file.identity: file for file, _ in self.opened.parts}
        sent = [
            (send(self.opened, files[identity], {entry.start: entry for entry in group.values()}, device), list(group))
            for (identity, _), group in groups.items()
        ]  # fmt: skip
        return [*travelling.values(), *sent]

    def send_ahead(self, module: torch.nn.Module, device: torch.device) -> None:
        """Let the weights leave before anybody asks for them, if all of them are at home and none is on its way."""
        if not self.opened.ahead and self.at_home(module) == self.homes.keys():
            send_ahead(self.opened, map(stored_in, self.homes.values()), device)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight in the dtype that it is used in, computed where it lies."""
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def cast_at_home(self, module: torch.nn.Module) -> None:
        """Cast what was not sent, so that the host copies it in the right dtype."""
        if self.dtype:
            for key in self.at_home(module):
                with torch.inference_mode(False):
                    put(module, key, self.cast(self.homes[key]))

    def make_writable(self, module: torch.nn.Module, key: str) -> None:
        """Let a weight that lies in read-only pinned memory lie at home again, where writing is private."""
        flat = self.pinned.get(self.origins[key][0].identity) if key in self.origins else None
        if flat is None:
            return
        now = stored_in(operator.attrgetter(key)(module))
        if 0 <= now.data_ptr() - flat.data_ptr() < flat.numel():
            put(module, key, self.homes[key])

    def pin(self, module: torch.nn.Module, key: str, device: torch.device) -> None:
        """Make a weight that is at home a view of its file in pinned memory."""
        home = self.homes[key]
        if stored_in(operator.attrgetter(key)(module)).data_ptr() != stored_in(home).data_ptr():
            return
        file, entry = self.origins[key]
        if file.identity not in self.pinned:
            self.pinned[file.identity] = mmap_pin.pinned_bytes(file, device)
        flat = self.pinned[file.identity]
        if flat is not None:
            with torch.inference_mode(False):
                data = flat[entry.start : entry.start + entry.nbytes]
                data = data.view(entry.dtype).view(entry.shape)
                put(module, key, with_stored(home, data))

    def changed(self) -> None:
        """Tell who made something of the weights that they lie elsewhere now, or are others."""
        for watcher in list(self.watchers):
            watcher.weights_changed()

    def release(self, module: torch.nn.Module, keys: Iterable[str]) -> None:
        """Give up the device's copies of weights that nothing will read there; patched ones stay. See `bring_back`."""
        now = weights_of(module)
        going = (set(keys) & self.origins.keys()) - self.at_home(module)
        going -= self.patched.keys() | self.hooked.keys()
        buffers = {stored_in(now[key]).untyped_storage().data_ptr() for key in going}
        for key in self.homes.keys() - going:
            if stored_in(now[key]).untyped_storage().data_ptr() in buffers:
                with lasting(self.homes[key]):  # of its own, so that the flat buffer goes
                    put(module, key, with_stored(now[key], stored_in(now[key]).clone()))
        for key in going:
            put(module, key, self.homes[key])
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
            put(module, key, self.homes[key])


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their keys."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def stored_in(weight: torch.Tensor) -> torch.Tensor:
    """What a weight's bytes are: of one that the host quantised the tensor inside, else itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight
    names, _ = weight.__tensor_flatten__()
    return max((getattr(weight, name) for name in names), key=lambda inner: inner.nbytes)


def with_stored(weight: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """The same weight with its bytes elsewhere; a quantised one takes its scales with it."""
    if not hasattr(weight, "__tensor_flatten__"):
        return stored
    names, context = weight.__tensor_flatten__()
    old = stored_in(weight)
    inner = {name: getattr(weight, name) for name in names}
    moved = {name: stored if t is old else t.to(stored.device) for name, t in inner.items()}
    kind: Any = type(weight)
    return kind.__tensor_unflatten__(moved, context, weight.shape, weight.stride())


def lasting(weight: torch.Tensor | None) -> contextlib.AbstractContextManager:
    """Weights outlive the prompt, so they are made outside its inference mode; the host's quantised ones cannot be."""
    quantised = hasattr(weight, "__tensor_flatten__")
    return contextlib.nullcontext() if quantised else torch.inference_mode(False)


def put(module: torch.nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer of a module by its key."""
    owner, _, leaf = key.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._buffers:
        part._buffers[leaf] = tensor
    else:
        setattr(part, leaf, torch.nn.Parameter(tensor, requires_grad=False))
