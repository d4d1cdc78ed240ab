"""Autograd's graph of one run: which ways lead from the input to the result, and what lies beside a place."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta.engine import interception
from esegeta.engine.views import Passed


class Graph:
    """Autograd's graph of one run of a score, with the places that it passed."""

    def __init__(self, score: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of inference mode never get a graph; a copy made outside of it does.
            leaf = x.detach().clone().requires_grad_()
            result, self.passed = interception.list_passed(score, leaf)
            start = leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        self.passed = [p for p in self.passed if not (p.vertex and p.vertex[0] is start)]
        roots = [t for t in ([result] if isinstance(result, Tensor) else []) if t.grad_fn is not None]
        vertices = [(t.grad_fn, t.output_nr) for t in roots]
        if not vertices:  # a count, say: then what the network computed last
            vertices = [p.vertex for p in self.passed[-1:] if p.vertex]
        self.start = start
        self.ways = self._ways(vertices)
        self.readers: dict[Any, list[tuple[Any, Any, float]]] = {}
        for vertex, into in self.ways.items():
            self.readers.setdefault(vertex[0], []).extend((vertex, node, time) for node, time in into)
        self.calls = Counter({p.at.side: p.at.call + 1 for p in self.passed})
        self.names: dict[Any, str] = {}  # of each tensor the first
        for passed in self.passed:
            if passed.vertex is not None:
                self.names.setdefault(passed.vertex, self.label(passed))

    def _ways(self, roots: Sequence[Any]) -> dict[Any, list[tuple[Any, float]]]:
        """What reads each vertex on a way from the input to the result: consumers with their time."""
        after: dict[Any, list[Any]] = {}
        below: dict[Any, list[Any]] = {}
        stack = [node for node, _ in roots]
        seen = set(stack)
        while stack:
            node = stack.pop()
            below[node] = [(n, nr) for n, nr in node.next_functions if n is not None]
            for n, _ in below[node]:
                after.setdefault(n, []).append(node)
                if n not in seen:
                    seen.add(n)
                    stack.append(n)
        reaches = {self.start} if self.start in seen else set()
        stack = list(reaches)
        while stack:
            for node in after.get(stack.pop(), []):
                if node not in reaches:
                    reaches.add(node)
                    stack.append(node)
        ways: dict[Any, list[tuple[Any, float]]] = {}
        for root in roots:
            if root[0] in reaches:
                ways.setdefault(root, []).append((None, float("inf")))
        for node in reaches:
            for vertex in below.get(node, []):
                if vertex[0] in reaches:
                    ways.setdefault(vertex, []).append((node, self._time(node)))
        return ways

    def _time(self, node: Any) -> float:
        return -1.0 if node is self.start else float(node._sequence_nr())

    def label(self, passed: Passed) -> str:
        """Return how to ask for it: with the number of the call if there are several."""
        return passed.at.in_full if self.calls[passed.at.side] > 1 else str(passed.at)

    def used(self, passed: Passed) -> bool:
        """Return whether a way from the input to the result leads through it."""
        return passed.vertex in self.ways

    def first_name(self, passed: Passed) -> str:
        """Return another name that its tensor had before, or nothing."""
        first = self.names.get(passed.vertex, "")
        return "" if first == self.label(passed) else first

    def beside(self, chosen: Sequence[Passed]) -> tuple[str, ...]:
        """Return the places that carry what bypasses the chosen ones, as of the time of the last of them."""
        # What has read a tensor before the place was passed is not reached by what is put in there.
        since = {p.vertex: p.time for p in reversed(chosen) if p.vertex in self.ways}
        if not since or not self._bypassed(since):
            return ()
        now = max(since.values())
        crossing = [
            vertex
            for vertex, readers in self.ways.items()
            if vertex not in since
            and self._time(vertex[0]) <= now
            and any(time > now for _, time in readers)
            and self._bypassed(since, vertex[0])
        ]
        found = {self._carrier(vertex, now) for vertex in crossing}
        order = ["input", *map(self.label, self.passed)]
        return tuple(sorted((n for n in found if n is not None), key=order.index))

    def _bypassed(self, since: dict[Any, float], goal: Any = None) -> bool:
        """Whether a way from the input to the result (or to a node) avoids all of these."""
        reached, stack = {self.start}, [self.start]
        while stack:
            node = stack.pop()
            if node is goal:
                return True
            for vertex, reader, time in self.readers.get(node, []):
                if vertex in since and time > since[vertex]:
                    continue
                if reader is None and goal is None:
                    return True
                if reader is not None and reader not in reached:
                    reached.add(reader)
                    stack.append(reader)
        return False

    def _carrier(self, vertex: Any, now: float) -> str | None:
        """The name to ask for what is read of a tensor after a time: the last that comes before those readers.

        So the output of a block that a skip connection carries, not the layer that also feeds what comes next.
        """
        first = min(time for _, time in self.ways[vertex] if time > now)
        fitting = [self.label(p) for p in self.passed if p.vertex == vertex and p.time < first]
        return fitting[-1] if fitting else self._named(vertex)

    def _named(self, vertex: Any) -> str | None:
        """Its name, or that of what it is made of."""
        seen: set[Any] = set()
        stack: list[Any] = [vertex]
        while stack:
            here = stack.pop(0)
            if here in self.names:
                return self.names[here]
            if here[0] is self.start:
                return "input"
            if here not in seen:
                seen.add(here)
                stack += [v for v in here[0].next_functions if v[0] is not None and v in self.ways]
        return None
