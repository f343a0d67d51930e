"""Doing without torch.compile, which takes longer to import than diffusers, in a process in which nobody compiles.

Diffusers and transformers import it, and torch.distributed with it, to mark functions for who does.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"  # what is imported of it for masks


def without_compiler(undo: contextlib.ExitStack) -> None:
    """Let modules pass for the compiler's until somebody wants more of it, and torch pass for one without torch.distributed.

    Args:
        undo: what ends it. Nothing is done where the compiler is imported already.
    """
    import torch.distributed

    if COMPILER in sys.modules:
        return
    undo.callback(setattr, torch.distributed, "is_available", torch.distributed.is_available)
    torch.distributed.is_available = lambda: False
    sys.modules.update({name: _Unimported(name) for name in STAND_INS})
    sys.meta_path.insert(0, _Finder)
    undo.callback(_give_way)


def _give_way() -> None:
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), _Unimported):
            del sys.modules[name]
    with contextlib.suppress(ValueError):
        sys.meta_path.remove(_Finder)


def _real(name: str) -> Any:
    _give_way()
    return importlib.import_module(name)


def _mark(function: Callable | None = None, *_: Any, **__: Any) -> Any:
    """In place of a decorator."""
    return _mark if function is None else function


STAND_INS: dict[str, dict[str, Any]] = {
    COMPILER: {
        "allow_in_graph": _mark,
        "assume_constant_result": _mark,
        "disable": _mark,
        "eval_frame": types.SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),  # nothing is one
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
        found = sys.modules.pop(name, None)
        return None if found is None else ModuleSpec(name, _Finder(found))  # type: ignore[arg-type]

    def create_module(self, _: ModuleSpec) -> types.ModuleType:
        return self._found

    def exec_module(self, found: types.ModuleType) -> None:
        found.__spec__ = self._spec  # it has run
