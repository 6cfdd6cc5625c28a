"""Streams and events, and the copies to the CPU that complete only when one of them is synchronized.

Kernels run at once, so a stream has nothing to wait for but copies to the CPU: those of `non_blocking=True` are put
off, with the values that the source had when the copy was made, until something synchronizes. Reading the target before that gives
what was in it before, as it may on a real device.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from numerics_standin.memory import NAME
from numerics_standin.switches import DEVICE_COUNT, check_alive, switches

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_ids = itertools.count()
_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
    """A queue of copies on one device index.

    Args:
        device: The device; None for the current one.
        priority: Taken for the sake of CUDA's signature.
    """

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = torch.device(NAME, device_index(device))
        self.priority = priority
        self.stream_id = next(_ids)
        self._pending: list[Callable[[], None]] = []
        self._issued = 0
        self._done = 0
        self._lock = threading.RLock()
        _streams.add(self)

    def put_off(self, work: Callable[[], None]) -> None:
        """Run `work` when the stream is synchronized."""
        with self._lock:
            self._pending.append(work)
            self._issued += 1

    def complete(self, upto: int | None = None) -> None:
        """Run what is put off; with `upto`, only what was put off before that position."""
        with self._lock:
            while self._pending and (upto is None or self._done < upto):
                self._done += 1
                self._pending.pop(0)()

    def query(self) -> bool:
        """Whether all work is done. Each call that says no lets the work complete, so that polling ends."""
        done = not self._pending
        self.complete()
        return done

    def synchronize(self) -> None:
        """Complete all work."""
        if switches.lost:
            check_alive()
        self.complete()

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, and return it."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Complete the work before `event` before later work of this stream."""
        self.put_off(event.complete)

    def wait_stream(self, stream: Stream) -> None:
        """Complete the work that `stream` has now before later work of this stream."""
        self.wait_event(stream.record_event())

    def __enter__(self) -> Self:
        """Make it the current stream of its device, and its device the current one."""
        self._before = (current_device(), current_stream(self.device))
        set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was current."""
        index, before = self._before
        _current[self.device.index] = before
        set_device(index)

    def __repr__(self) -> str:
        return f"<torch.{NAME}.Stream device={self.device} id={self.stream_id}>"


class Event:
    """A position in a stream.

    Args:
        enable_timing: Whether `elapsed_time` may be asked for.
        blocking: Taken for the sake of CUDA's signature.
        interprocess: As `blocking`.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self._stream: Stream | None = None
        self._position = 0
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Take the position that `stream`, by default the current one, has now."""
        if switches.lost:
            check_alive()
        self._stream = stream or current_stream()
        self._position = self._stream._issued
        self._time = time.perf_counter()

    def complete(self) -> None:
        """Run what the stream had put off before the position."""
        if self._stream is not None:
            self._stream.complete(self._position)

    def synchronize(self) -> None:
        """Complete all work before the position."""
        if switches.lost:
            check_alive()
        self.complete()

    def wait(self, stream: Stream | None = None) -> None:
        """Make later work of `stream` wait for the event."""
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Whether all work before the position is done; see `Stream.query`."""
        done = self._stream is None or self._stream._done >= self._position
        self.complete()
        return done

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        if not (self.enable_timing and end.enable_timing):
            message = "Both events must be created with argument 'enable_timing=True'."
            raise ValueError(message)
        return (end._time - self._time) * 1000


_state = threading.local()
_default = []
_current = []


def device_index(device: object = None) -> int:
    """Return the index that `device` (None, an int, a string or a torch.device) stands for.

    Raises:
        ValueError: The device is of another kind.
        RuntimeError: There is no such index.
    """
    if device is None:
        return current_device()
    if not isinstance(device, int):
        device = torch.device(device)
        if device.type != NAME:
            message = f"Expected a {NAME} device, but got: {device}"
            raise ValueError(message)
        device = current_device() if device.index is None else device.index
    if not 0 <= device < DEVICE_COUNT:
        message = f"{NAME} error: invalid device ordinal"
        raise RuntimeError(message)
    return device


def current_device() -> int:
    """Return the current device's index, which each thread has for itself."""
    return getattr(_state, "index", 0)


def follow_autograd(index: int) -> None:
    """Make `index` current in a thread of autograd's, which PyTorch starts for one device and CUDA's guard sets to it."""
    if not hasattr(_state, "index"):
        started_in_cpp = isinstance(threading.current_thread(), threading._DummyThread)
        _state.index = index if started_in_cpp else 0


def set_device(device: object) -> None:
    """Make `device` the current one."""
    _state.index = device_index(device)


def current_stream(device: object = None) -> Stream:
    """Return the current stream of `device`."""
    return _current[device_index(device)]


def default_stream(device: object = None) -> Stream:
    """Return the stream that `device` starts with."""
    return _default[device_index(device)]


def set_stream(stream: Stream) -> None:
    """Make `stream` the current one of its device, and its device the current one."""
    _current[stream.device.index] = stream
    set_device(stream.device)


@contextmanager
def stream(chosen: Stream | None):
    """Make `chosen` current for the while; None changes nothing."""
    if chosen is None:
        yield
        return
    with chosen:
        yield


def synchronize(device: object = None) -> None:
    """Complete all work of all streams of `device`."""
    if switches.lost:
        check_alive()
    index = device_index(device)
    for queue in list(_streams):
        if queue.device.index == index:
            queue.complete()


def complete_all() -> None:
    """Complete all work of every stream: what a `torch.Event`, whose position C++ does not keep, waits for."""
    for queue in list(_streams):
        queue.complete()


def query_all() -> bool:
    """Whether no stream has work; see `Stream.query`."""
    done = [queue.query() for queue in list(_streams)]  # each one makes progress, also after one that says no
    return all(done)


_default.extend(Stream(index) for index in range(DEVICE_COUNT))
_current.extend(_default)
