"""Streams of a GPU that is not there: each does its work in order, and nobody knows when."""

import random
import threading
from collections.abc import Callable

import pytest
import torch

Act = Callable[[], None]


class Gpu:
    """What `torch.cuda` offers of streams, events and graphs. Work is done at random moments; `advance` and whoever
    waits let time go by."""

    def __init__(self, seed: int) -> None:
        self.random, self.lock, self.here = random.Random(seed), threading.RLock(), threading.local()
        self.streams: list[Stream] = []
        self.computing = self.Stream()
        self.captured: list[Act] | None = None

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its methods in place of torch's."""
        for name in ("Stream", "Event", "stream", "current_stream", "set_stream", "synchronize", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def Stream(self, device: object = None) -> "Stream":
        self.streams.append(Stream(self))
        return self.streams[-1]

    def Event(self) -> "Event":
        return Event(self)

    def CUDAGraph(self) -> "Graph":
        return Graph(self)

    def stream(self, chosen: "Stream") -> "Entered":
        return Entered(self, chosen)

    def graph(self, graph: "Graph", *, stream: "Stream", **_: object) -> "Capture":
        return Capture(self, graph, stream)

    def current_stream(self, device: object = None) -> "Stream":
        return getattr(self.here, "stream", self.computing)

    def set_stream(self, stream: "Stream") -> None:
        self.here.stream = stream

    def enqueue(self, act: Act) -> None:
        """Work for the current stream; while a graph is captured, for that."""
        if self.captured is None:
            self.current_stream().enqueue(act)
        else:
            self.captured.append(act)

    def advance(self) -> None:
        """Do one piece of work that can be done."""
        with self.lock:
            ready = [s for s in self.streams if s.work and s.work[0][0]()]
            if ready:
                self.random.choice(ready).work.pop(0)[1]()

    def synchronize(self, device: object = None) -> None:
        while any(s.work for s in self.streams):
            self.advance()


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, []

    def enqueue(self, act: Act, ready: Callable[[], bool] = lambda: True) -> None:
        with self.gpu.lock:
            self.work.append((ready, act))

    def wait_event(self, event: "Event") -> None:
        awaited = event.recorded
        self.enqueue(lambda: None, lambda: event.done >= awaited)

    def wait_stream(self, other: "Stream") -> None:
        event = self.gpu.Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        while self.work:
            self.gpu.advance()


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.recorded, self.done = gpu, 0, 0

    def record(self, on: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def reach() -> None:
            self.done = number

        on.enqueue(reach)

    def synchronize(self) -> None:
        awaited = self.recorded
        while self.done < awaited:
            self.gpu.advance()


class Entered:
    def __init__(self, gpu: Gpu, chosen: Stream) -> None:
        self.gpu, self.chosen = gpu, chosen

    def __enter__(self) -> None:
        self.before = self.gpu.current_stream()
        self.gpu.set_stream(self.chosen)

    def __exit__(self, *_: object) -> None:
        self.gpu.set_stream(self.before)


class Graph:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.acts = gpu, None

    def replay(self) -> None:
        for act in self.acts:
            self.gpu.enqueue(act)

    def reset(self) -> None:
        assert not any(s.work for s in self.gpu.streams), "a graph ends while it may run"
        self.acts = None


class Capture(Entered):
    """As torch's: where a capture fails, so does its end, which leaves the current stream what it is."""

    def __init__(self, gpu: Gpu, graph: Graph, chosen: Stream) -> None:
        super().__init__(gpu, chosen)
        self.graph = graph

    def __enter__(self) -> None:
        super().__enter__()
        self.gpu.captured = []

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.graph.acts, self.gpu.captured = self.gpu.captured, None
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        super().__exit__(kind, *rest)
