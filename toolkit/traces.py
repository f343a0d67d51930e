"""What torch.compile found out about a call, kept so that a later process neither traces nor compiles it again.

Tracing the code of two blocks takes longer than their first image. A trace holds the compiled graph, where in the call its
inputs are, and what torch guards: each place in the arguments and in the code's modules that it looked at, with what was
there. All of that is looked at again before each use, so a trace serves the calls that torch itself would serve.
"""

from __future__ import annotations

import hashlib
import operator
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .facts import Globals, fact, function_of, tensor_fact, tuple_of


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
            tuple_of(places, scope)
            for places in (trace.inputs, trace.tensors, trace.facts, trace.conditions, *(kinds[k] for k in ("value", "code", "other")))
        )  # fmt: skip
        self._filled = function_of(" or ".join(kinds["empty"]) or "None", scope)
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


def _first_difference(places: Any, expected: list, found: list) -> str:
    differing = (
        (place, was, now)
        for place, was, now in zip(places, expected, found, strict=True)
        if was != now
    )
    return "{}: {} was {}".format(*next((p, now, was) for p, was, now in differing))


def _state_guard() -> Any:
    return torch._C._dynamo.guards.GlobalStateGuard()
