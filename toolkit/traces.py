"""What torch.compile found out about a call, kept so that a later process neither traces nor compiles it again.

Tracing the code of two blocks takes longer than their first image. A trace holds the compiled graph, where in the call its
inputs are, and what torch guards: each place in the arguments and in the code's modules that it looked at, with what was
there. All of that is looked at again before each use, so a trace serves the calls that torch itself would serve.
"""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import hashlib
import operator
import pickle
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
EXACT = (
    "SHAPE_ENV",
    "HASATTR",
    "DICT_CONTAINS",
    "DICT_NOT_CONTAINS",
    "DUPLICATE_INPUT",
)  # guards whose own words count
TORCH = str(Path(torch.__file__).parent)
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


def available() -> bool:
    """Whether this torch can write a compiled graph to disk: 2.9 and later."""
    try:
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable  # noqa: F401
        from torch._functorch import config
    except ImportError:
        return False
    return hasattr(config, "bundled_autograd_cache") and hasattr(_state_guard(), "__setstate__")


@dataclass
class Trace:
    """One compiled graph and when it may be used; what is written to disk.

    Attributes:
        function: module and name of what was compiled.
        tensors: place -> (dimensions that may have any length, what is known of the tensor there).
        facts: place -> what was there, see `fact`.
        conditions: on the lengths and on what is absent, as Python.
        inputs: the places of the graph's inputs, in order.
        result: the numbers of the outputs that the call returns, one alone or several.
        state: torch's own (grad mode, autocast, default dtype ...), in its words.
        files: path -> digest, of the code that was traced.
        graph: as torch writes it.
    """

    function: str
    tensors: dict[str, tuple[tuple[int, ...], tuple]]
    facts: dict[str, Any]
    conditions: list[str]
    inputs: list[str]
    result: int | tuple[int, ...]
    state: str
    files: dict[str, str]
    graph: bytes = field(repr=False)

    def write(self, path: Path) -> None:
        """Write to a file, or leave it as it was."""
        body = pickle.dumps(vars(self))
        draft = path.with_suffix(".draft")
        draft.write_bytes(hashlib.sha256(body).digest() + body)
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a file of the user's own cache folder; only there is unpickling safe.

        Raises:
            ValueError: it is damaged.
        """
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError(f"{path} is damaged")
        return cls(**pickle.loads(data[32:]))

    def stale(self) -> str:
        """Which file of the code is not as it was; empty if none."""
        return next(
            (path for path, digest in self.files.items() if file_digest(path) != digest), ""
        )


class Ready:
    """A trace in use.

    Args:
        trace: of a function whose module is imported.

    Attributes:
        used: whether it ran.
    """

    def __init__(self, trace: Trace):
        from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

        self.trace = trace
        self.used = False
        self._look = Look(trace, vars(sys.modules[trace.function.rpartition(".")[0]]))
        self._graph = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(trace.graph)  # fmt: skip

    def why_not(self, call: dict[str, Any]) -> str:
        """What differs from the call that was traced; empty if nothing does."""
        return self._look.why_not(call)

    def __call__(self, call: dict[str, Any]) -> Any:
        """Run with the arguments of a call, by their names."""
        out = self._graph(*self._look.inputs(call))
        self.used = True
        result = self.trace.result
        return out[result] if isinstance(result, int) else tuple(out[i] for i in result)


class Look:
    """The places of a trace as code, so that a look at hundreds of them costs less than a kernel's launch.

    Args:
        trace: the trace.
        names: the globals of the function.

    Attributes:
        inputs: the graph's inputs in a call.
    """

    def __init__(self, trace: Trace, names: Mapping[str, Any]):
        scope = {"G": Globals(names), "torch": torch, "___dict_contains": lambda key, d: key in d}
        kinds: dict[str, list[str]] = {kind: [] for kind in ("value", "empty", "code", "other")}
        for place, known in trace.facts.items():
            kinds[known[0]].append(place)
        self._trace = trace
        self.inputs, self._tensors, self._facts, self._conditions, self._values, self._code, self._others = (
            _tuple_of(places, scope)
            for places in (trace.inputs, trace.tensors, trace.facts, trace.conditions, *(kinds[k] for k in ("value", "code", "other")))
        )  # fmt: skip
        self._filled = _function(" or ".join(kinds["empty"]) or "None", scope)
        self._state = _state_guard()
        self._state.__setstate__(trace.state)
        self._free = [free for free, _ in trace.tensors.values()]
        self._known_tensors = [known for _, known in trace.tensors.values()]
        self._known_values = tuple(trace.facts[place][1] for place in kinds["value"])
        self._types = tuple(map(type, self._known_values))
        self._known_others = [trace.facts[place] for place in kinds["other"]]
        self._same_code: tuple = (None,) * len(kinds["code"])  # what was looked at closely

    def why_not(self, call: dict[str, Any]) -> str:
        """What differs from the call that was traced; empty if nothing does."""
        if not self._state.check() or torch._C._len_torch_function_stack():
            return "torch's state"
        try:
            tensors = list(map(tensor_fact, self._tensors(call), self._free))
            if tensors != self._known_tensors:
                return _first_difference(self._trace.tensors, self._known_tensors, tensors)
            if not self._as_before(call):
                found = list(map(fact, self._facts(call)))
                if found != (known := list(self._trace.facts.values())):
                    return _first_difference(self._trace.facts, known, found)
                self._same_code = self._code(call)
            held = self._conditions(call)
        except (AttributeError, LookupError, TypeError) as error:  # nothing is at one of the places
            return f"{type(error).__name__} {error}"
        return "" if all(held) else self._trace.conditions[list(map(bool, held)).index(False)]

    def _as_before(self, call: dict[str, Any]) -> bool:
        """Whether all facts are surely as they were; quick."""
        values = self._values(call)
        return (
            values == self._known_values
            and tuple(map(type, values)) == self._types
            and not self._filled(call)
            and all(map(operator.is_, self._code(call), self._same_code))
            and list(map(fact, self._others(call))) == self._known_others
        )


class Draft:
    """Collects a trace while torch compiles a call for the first time."""

    def __init__(self) -> None:
        self._open = True
        self._graphs: list[tuple[list[str], Callable]] = []
        self._guards: list[Any] = []
        self._files: set[str] = set()
        self._outputs: Sequence[Any] = ()

    def compiled(self, graph: torch.fx.GraphModule, run: Callable) -> Callable:
        """Note what the backend made of a graph; returns what torch shall call."""
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        sources = [getattr(node.meta.get("grapharg"), "source", None) for node in nodes]
        names = [source.name if source else "" for source in sources]
        self._graphs.append(([name() if callable(name) else name for name in names], run))
        traced = torch._guards.TracingContext.get_traced_code() or []
        self._files |= {code.co_filename for code in traced}

        def noted(*inputs: Any) -> Any:
            out = run(*inputs)
            if self._open:
                self._outputs = out
            return out

        return noted

    def guarded(self, guards: Sequence[Any]) -> list[bool]:
        """Note torch's guards, and keep them all: a guard_filter_fn of torch.compile."""
        self._guards += guards
        return [True] * len(guards)

    def finish(self, function: Callable, call: dict[str, Any], result: Any, state: str) -> Trace:
        """The trace of the call that has just run.

        Raises:
            Unkept: it cannot be kept.
        """
        outputs = self._outputs
        if len(self._graphs) != 1 or not self._guards:
            raise Unkept(f"{len(self._graphs)} graphs for one call")
        inputs, run = self._graphs[0]
        if not all(inputs) or getattr(run, "serialize", None) is None:
            raise Unkept("torch cannot write this graph")
        several = result if isinstance(result, tuple) else (result,)
        numbers = [i for r in several for i in [i for i, o in enumerate(outputs) if o is r][:1]]
        if len(numbers) < len(several):
            raise Unkept("it returns more than the graph does")
        tensors, facts, conditions = self._sort(function, call)
        files = {path: file_digest(path) for path in sorted(self._files) if not path.startswith((TORCH, "<"))}  # fmt: skip
        trace = Trace(
            name_of(function),
            tensors,
            facts,
            conditions,
            inputs,
            tuple(numbers) if isinstance(result, tuple) else numbers[0],
            state,
            files,
            _written(run),
        )
        if why_not := Look(trace, function.__globals__).why_not(call):
            raise Unkept(f"it does not hold for its own call: {why_not}")
        return trace

    def close(self) -> None:
        """Let go of all that was collected: guards hold weights, and what torch calls holds this."""
        self._open, self._graphs, self._guards, self._outputs = False, [], [], ()

    def _sort(self, function: Callable, call: dict[str, Any]) -> tuple[dict, dict, list[str]]:
        """Tensors, facts and conditions from the guards."""
        scope = {"G": Globals(function.__globals__), "torch": torch}
        tensors: dict[str, tuple] = {}
        facts: dict[str, Any] = {}
        conditions: dict[str, None] = {}
        nested: list[str] = []
        for guard in self._guards:
            own = guard.orig_guard
            if guard.guard_type in EXACT:
                words = own.code_list or ()
                # what torch made unique by itself (one module under two names) needs no look
                conditions |= dict.fromkeys(w for w in words if guard.guard_type != "DUPLICATE_INPUT" or "L[" in w)  # fmt: skip
            place = own.name() if callable(own.name) else own.name
            if not place or place in tensors or place in facts:
                continue
            try:
                value = _tuple_of([place], scope)(call)[0]
            except AttributeError as error:
                if guard.guard_type != "HASATTR":
                    raise Unkept(f"{place}: {error}") from error
                of, _, name = place.rpartition(".")
                conditions[f"not hasattr({of}, {name!r})"] = None
                continue
            except (LookupError, NameError, TypeError) as error:
                raise Unkept(f"{place}: {type(error).__name__} {error}") from error
            if isinstance(value, torch.Tensor):
                free = tuple(sorted(getattr(value, "_dynamo_weak_dynamic_indices", ())))
                tensors[place] = free, tensor_fact(value, free)
                nested += [f"{place}."] * hasattr(value, "__tensor_flatten__")
            else:
                facts[place] = fact(value)
        # what is known of a quantised weight says all about its parts, some of which are made when it is looked at
        parts = tuple(nested)
        tensors, facts = ({k: v for k, v in of.items() if not k.startswith(parts)} for of in (tensors, facts))  # fmt: skip
        return tensors, facts, list(conditions)


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


def name_of(function: Callable) -> str:
    """Module and name."""
    return f"{function.__module__}.{function.__qualname__}"


def state() -> str:
    """Torch's own state, as a trace keeps it."""
    return _state_guard().__getstate__()


def file_digest(path: str) -> str:
    """Of a file's bytes; empty if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


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


def _tuple_of(places: Any, scope: dict[str, Any]) -> Callable[[dict], tuple]:
    return _function(f"({''.join(f'{place},' for place in places)})", scope)


def _function(expression: str, scope: dict[str, Any]) -> Callable[[dict], Any]:
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


def _first_difference(places: Any, expected: list, found: list) -> str:
    differing = (
        (place, was, now)
        for place, was, now in zip(places, expected, found, strict=True)
        if was != now
    )
    return "{}: {} was {}".format(*next((p, now, was) for p, was, now in differing))


def _state_guard() -> Any:
    return torch._C._dynamo.guards.GlobalStateGuard()


def _written(run: Callable) -> bytes:
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Written

    return Written.serialize_compile_artifacts(Written(run))
