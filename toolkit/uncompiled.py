"""Doing without torch.compile, which takes longer to import than diffusers, in a process in which nobody compiles.

Diffusers and transformers import it, and torch.distributed with it, to mark functions for who does.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"  # what is imported of it for masks
log = logging.getLogger("ark")
_alone = contextlib.ExitStack()  # until it closes torch.distributed is not available


def without_compiler(undo: contextlib.ExitStack) -> None:
    """Let modules pass for the compiler's until somebody wants more of it, and torch pass for one without torch.distributed.

    Args:
        undo: what ends it. Nothing is done where the compiler is imported already.
    """
    import torch.distributed

    if COMPILER in sys.modules:
        return
    _alone.callback(setattr, torch.distributed, "is_available", torch.distributed.is_available)
    torch.distributed.is_available = lambda: False
    sys.modules.update({name: _Unimported(name) for name in STAND_INS})
    sys.meta_path.insert(0, _Finder)
    undo.callback(_give_way)


def _give_way() -> None:
    _alone.close()  # the compiler looks for torch.distributed, too
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _Unimported):
            del sys.modules[name]
    # in place, another thread that goes through it would miss one
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _Finder]


def _real(name: str) -> Any:
    if isinstance(sys.modules.get(COMPILER), _Unimported):
        log.info("Ark: torch.compile is imported after all, somebody wants %s.", name)
    _give_way()
    return importlib.import_module(name)


def _mark(fn: Callable | None = None, *_: Any, **__: Any) -> Any:
    """In place of a decorator."""
    return _mark if fn is None else fn


class _Compiled:
    """In place of a module that is asked what is compiled: nothing is."""

    OptimizedModule = type("OptimizedModule", (), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(f"{COMPILER}.eval_frame"), name)


STAND_INS: dict[str, dict[str, Any]] = {
    COMPILER: {
        "allow_in_graph": _mark,
        "assume_constant_result": _mark,
        "disable": _mark,
        "eval_frame": _Compiled(),
    },
    INDEXING: {"TransformGetItemToIndex": lambda: _real(INDEXING).TransformGetItemToIndex()},
}  # fmt: skip


class _Unimported(types.ModuleType):
    """Has the stand-ins of a module, and all else of the real one."""

    __path__: list[str] = []  # noqa: RUF012 (a package has one)

    def __getattr__(self, name: str) -> Any:
        if name in STAND_INS[self.__name__]:
            return STAND_INS[self.__name__][name]
        if name.startswith("__"):  # who looks through all modules asks for such
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Finder:
    """Finds what is below the compiler's module by importing that, and keeps it from being loaded once more."""

    def __init__(self, found: types.ModuleType):
        self._found, self._spec = found, found.__spec__

    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        if not name.startswith(f"{COMPILER}."):
            return None
        _real(COMPILER)
        found = importlib.import_module(name)
        del sys.modules[name]  # or it would be loaded by its own spec
        return ModuleSpec(name, _Finder(found))  # type: ignore[arg-type]

    def create_module(self, _: ModuleSpec) -> types.ModuleType:
        return self._found

    def exec_module(self, found: types.ModuleType) -> None:
        found.__spec__ = self._spec  # it has run
