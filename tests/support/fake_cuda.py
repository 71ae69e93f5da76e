"""torch's own CUDA classes on a build without CUDA: streams are numbers, and the current one is each thread's.

`torch.cuda.stream` and `torch.cuda.graph` are those of torch, so that what they do around an error is what they do on a
GPU. The driver below them is this one.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import torch

DEVICE: Final = torch.device("cuda", 0)


@dataclass(eq=False)
class FakeStream:
    """A stream."""

    runtime: FakeCuda
    number: int
    device: torch.device = DEVICE

    def synchronize(self) -> None:
        """Note that the host waited."""
        self.runtime.calls.append(("synchronize", self.number))


@dataclass
class FakeCuda:
    """The state of the driver, and what was called."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    """Names, and the number of the stream that was current, or that was waited for."""
    is_capture_void: bool = False
    """Whether a capture fails at its end, as it does after a call that a graph cannot record."""
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _threads: threading.local = field(default_factory=threading.local)

    @property
    def current(self) -> FakeStream:
        """The current stream of this thread; 0 is the default stream."""
        found: FakeStream | None = getattr(self._threads, "stream", None)
        return FakeStream(self, 0) if found is None else found

    def note(self, name: str) -> None:
        """Add a call on the current stream."""
        self.calls.append((name, self.current.number))

    def set_stream(self, stream: FakeStream) -> None:
        """Make a stream the current one of this thread."""
        self._threads.stream = stream

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put this driver below torch's classes."""
        runtime = self

        class Graph:
            def capture_begin(self, *_: Any, **__: Any) -> None:
                runtime.note("capture_begin")

            def capture_end(self) -> None:
                runtime.note("capture_end")
                if runtime.is_capture_void:
                    raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream(self, next(self._numbers)))
        monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.note(name))
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        zeros = torch.zeros

        def zeros_on_cpu(*args: Any, device: Any = None, **named: Any) -> torch.Tensor:
            self.note("zeros")
            return zeros(*args, **named)

        monkeypatch.setattr(torch, "zeros", zeros_on_cpu)
