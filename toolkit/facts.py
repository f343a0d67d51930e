"""What compiled code depends on in a call: the places that torch looked at, as code, and what is known of each thing there."""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
# What torch's guards and their conditions are written in.
EXPRESSIONS = (
    *(ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Dict, ast.Set),
    *(ast.Call, ast.keyword, ast.IfExp, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)  # fmt: skip
BUILTINS = {
    kind.__name__: kind
    for kind in (abs, bool, bytes, dict, float, frozenset, getattr, hasattr, id, int, isinstance, len, list, max, min, range, set, str, sum, tuple, type)
}  # fmt: skip


class Unkept(Exception):
    """A call cannot be kept; says why."""


class Globals:
    """The globals of a function, and the names under which torch's guards know modules."""

    def __init__(self, names: Mapping[str, Any]):
        self._names = names

    def __getitem__(self, name: str) -> Any:
        """A global, a module that is imported already, or the builtins."""
        if name in self._names:
            return self._names[name]
        if name.startswith("__builtins_dict__"):
            return vars(builtins)
        if name.startswith("__import_"):
            return sys.modules[name.removeprefix("__import_").replace("_dot_", ".")]
        raise KeyError(name)


def tuple_of(places: Iterable[str], scope: dict[str, Any]) -> Callable[[dict], tuple]:
    """What is at some places of a call, as a function of its arguments."""
    return function_of(f"({''.join(f'{place},' for place in places)})", scope)


def function_of(expression: str, scope: dict[str, Any]) -> Callable[[dict], Any]:
    """A function of a call's arguments `L`; the expression looks at things and compares them, and can do nothing else.

    Raises:
        Unkept: it could.
    """
    tree: Any = ast.parse(f"lambda L: {expression}", mode="eval")
    for node in ast.walk(tree.body.body):
        if not isinstance(node, EXPRESSIONS):
            raise Unkept(f"guards with a {type(node).__name__}")
    code = compile(tree, "<guards>", "eval").co_consts
    (function,) = (constant for constant in code if isinstance(constant, types.CodeType))
    return types.FunctionType(function, {**scope, "__builtins__": BUILTINS})


def tensor_fact(tensor: torch.Tensor, free: tuple[int, ...]) -> tuple:
    """What compiled code depends on of a tensor: not its values, and not its length in some dimensions."""
    if not isinstance(tensor, torch.Tensor):
        return (fact(tensor),)
    kind = type(tensor)
    shape = [-1 if i in free else n for i, n in enumerate(tensor.shape)]
    # strides before a free dimension depend on its length; torch's own conditions say how
    known = (kind.__qualname__, tensor.dtype, tensor.device, tensor.requires_grad, *shape, tensor.stride()[free[0] if free else 0 :])  # fmt: skip
    if not hasattr(tensor, "__tensor_flatten__"):
        return known
    names, rest = tensor.__tensor_flatten__()
    return (*known, repr(rest), *(tensor_fact(getattr(tensor, name), ()) for name in names))


def fact(value: Any) -> tuple:
    """What compiled code depends on of anything else: comparable, and the same in each process.

    Returns:
        First its kind: "value", "empty" (a container), "code" (what lives as long as its module), or "other".
    """
    kind: Any = type(value)
    if kind in PLAIN:
        return "value", value, kind.__name__
    if isinstance(value, (dict, list, tuple)):
        if not value:
            return "empty", kind.__name__
        if not isinstance(value, dict):
            return "other", kind.__name__, len(value)
        # torch marks torch.nn.Module once it has traced anything, with three underscores
        keys = [key if isinstance(key, str) else "" for key in value]
        return "other", kind.__name__, *(key for key in keys if not key.startswith("___"))
    if isinstance(value, torch.nn.Module):
        return "other", _class_fact(kind), *sorted(vars(value).keys() & _attributes(kind))
    if kind is types.MethodType:  # made anew at each look
        return "other", *fact(value.__func__)
    if isinstance(value, CODE):
        if isinstance(value, types.FunctionType):
            return "code", *_place(value)
        return "code", _class_fact(value) if isinstance(value, type) else _class_fact(kind), value.__name__  # fmt: skip
    name = value.name if isinstance(value, enum.Enum) else getattr(value, "__name__", None)
    return "other", _class_fact(kind), name if isinstance(name, str) else None


def _place(function: types.FunctionType) -> tuple:
    code = function.__code__
    return function.__qualname__, code.co_filename, code.co_firstlineno


@functools.lru_cache
def _class_fact(kind: Any) -> str:
    """A class and where its methods were written, so that one that was replaced is seen."""
    methods = [
        (name, _place(value))
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType)
    ]
    digest = hashlib.sha256(repr(methods).encode()).hexdigest()[:16]
    return f"{kind.__module__}.{kind.__qualname__} {digest}"


@functools.lru_cache
def _attributes(kind: Any) -> frozenset[str]:
    """What an instance may hide of its class."""
    return frozenset(dir(kind))
