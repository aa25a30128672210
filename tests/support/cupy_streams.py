"""Streams and graphs of the stand-in for CuPy: work that runs when somebody waits for it.

A GPU may be done sooner. With `Stream.eager` set, all work runs at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from tests.support.emulator import EmulatedError


class Stream:
    """What the device is asked to do, in order. It runs when somebody waits for it."""

    all: ClassVar[weakref.WeakSet[Stream]] = weakref.WeakSet()
    current: ClassVar[list[Stream]] = []
    eager: ClassVar[bool] = False

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking
        self.ptr = 0 if null else id(self)
        self._waiting: list[Callable[[], None]] = []
        self._given = self._done = 0
        self._captured: list[Callable[[], None]] | None = None
        Stream.all.add(self)

    def __enter__(self) -> Stream:
        Stream.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current.pop()

    def enqueue(self, work: Callable[[], None]) -> None:
        if self._captured is not None:
            self._captured.append(work)
            return
        if not self.non_blocking:  # the null stream and those that wait for it, in CUDA's old way
            others = [s for s in Stream.all if not s.non_blocking and s is not self]
            for other in others if self.ptr == 0 else [Stream.null]:
                other.run_until(other._given)
        self._waiting.append(work)
        self._given += 1
        if Stream.eager:
            self.run_until(self._given)

    def run_until(self, count: int) -> None:
        while self._done < count:
            self._done += 1
            self._waiting.pop(0)()

    def synchronize(self) -> None:
        not_in_capture("a wait")
        self.run_until(self._given)

    @property
    def done(self) -> bool:
        return not self._waiting

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        stream, count = event._stream, event._count
        self.enqueue(lambda: stream.run_until(count))

    def begin_capture(self, mode: Any = None) -> None:
        assert self.ptr != 0, "CUDA does not capture its default stream"
        assert not capturing()
        self._captured = []

    def end_capture(self) -> Graph:
        assert self._captured is not None
        graph, self._captured = Graph(self._captured), None
        return graph

    def is_capturing(self) -> bool:
        return self._captured is not None


Stream.null = Stream(null=True)  # type: ignore[attr-defined]


class Event:
    """A place in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._stream, self._count = Stream.null, 0
        self._timed = not disable_timing

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream_or_current(stream)
        self._count = self._stream._given

    def synchronize(self) -> None:
        self._stream.run_until(self._count)

    @property
    def done(self) -> bool:
        return self._stream._done >= self._count


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events, of which all work of a stream takes one."""
    assert start_event._timed
    assert end_event._timed
    assert start_event.done, "an event that has not come"
    assert end_event.done, "an event that has not come"
    assert start_event._stream is end_event._stream
    return float(end_event._count - start_event._count)


class Graph:
    """Captured work."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work
        self.launches = 0

    def launch(self, stream: Stream | None = None) -> None:
        not_in_capture("a graph")
        self.launches += 1
        for step in self.work:
            stream_or_current(stream).enqueue(step)

    def upload(self, stream: Stream | None = None) -> None:
        pass


def get_current_stream(device_id: int = -1) -> Stream:
    return Stream.current[-1] if Stream.current else Stream.null


def stream_or_current(stream: Stream | None) -> Stream:
    return get_current_stream() if stream is None else stream


def enqueue(work: Callable[[], None]) -> None:
    """Give the current stream work that is no kernel of ours: a stand-in for cuBLAS does that."""
    get_current_stream().enqueue(work)


def capturing() -> bool:
    return any(stream.is_capturing() for stream in Stream.all)


def not_in_capture(what: str) -> None:
    if capturing():
        raise EmulatedError(f"{what} while a stream captures")


def before_eager(what: str) -> None:
    """Work on the current stream whose result is computed at once: after what it was given."""
    not_in_capture(what)
    stream = get_current_stream()
    stream.enqueue(lambda: None)
    stream.run_until(stream._given)
