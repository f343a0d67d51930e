"""A module that is run when somebody first reads from it, for what a library imports at its start and rarely uses.

The standard library's LazyLoader runs it as soon as an import statement finds it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.RLock()


class _Unread(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """What is not there yet; the module is run, once, and is then an ordinary one."""
        with _lock:
            if vars(self).pop("_ark_unread", False):
                self.__spec__.loader.exec_module(self)
                self.__class__ = ModuleType
        if name in vars(self) or type(self) is ModuleType:
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def import_lazily(name: str) -> None:
    """Put off what importing a module costs; nothing happens if it was imported, or is not there.

    Args:
        name: of the module, with its package.
    """
    package, _, attribute = name.rpartition(".")
    try:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
    except ImportError:
        spec = None
    if spec is None or spec.loader is None or not package:
        return
    module = importlib.util.module_from_spec(spec)
    vars(module)["_ark_unread"] = True
    module.__class__ = _Unread
    sys.modules[name] = module
    setattr(sys.modules[package], attribute, module)
