"""A trace in the making, while torch compiles a call for the first time; see `traces.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .facts import Globals, Unkept, fact, tensor_fact, tuple_of
from .traces import Look, Trace, file_digest, name_of

EXACT = (
    "SHAPE_ENV",
    "HASATTR",
    "DICT_CONTAINS",
    "DICT_NOT_CONTAINS",
    "DUPLICATE_INPUT",
)  # guards whose own words count
TORCH = str(Path(torch.__file__).parent)


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
                value = tuple_of([place], scope)(call)[0]
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


def _written(run: Callable) -> bytes:
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Written

    return Written.serialize_compile_artifacts(Written(run))
