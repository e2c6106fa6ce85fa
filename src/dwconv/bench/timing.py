"""Times contenders side by side on one GPU: cold L2, interleaved rounds, CUDA events, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import DepthwiseError

if TYPE_CHECKING:
    import torch

ROUNDS = 25
WARMUP = 3
LEAST_ROUNDS = 5
LIMIT_SECONDS = 10.0
FLUSH_L2_SIZES = 4
FLUSH_WRITES = 2  # some 120 µs on an H200, longer than a host needs to launch a compiled function
_LEAST_FLUSH_BYTES = 64 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """One contender's samples, in seconds.

    Attributes:
        median: the figure that is reported.
        low, high: quartiles; half of all samples lie between them.
        least: the fastest sample.
        samples: their number.
    """

    median: float
    low: float
    high: float
    least: float
    samples: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """The statistics of some samples; quartiles are interpolated.

        Raises:
            DepthwiseError: there is no sample.

        >>> Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Timing(median=3.0, low=2.0, high=4.0, least=1.0, samples=5)
        """
        samples = sorted(seconds)
        if not samples:
            raise DepthwiseError("no samples were taken: ask for one round or more")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, samples[0], len(samples))

    @property
    def spread(self) -> float:
        """Width of the middle half of all samples, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


class Clock(Protocol):
    """Where times come from. `CudaClock` reads a GPU's events; tests bring their own."""

    def flush(self) -> None:
        """Evicts from the L2 cache what earlier samples left there."""

    def mark(self) -> Any:
        """An event on the current stream, at this point of its queue."""

    def synchronize(self) -> None:
        """Waits until all events have happened."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two events that have happened."""

    def now(self) -> float:
        """The host's time in seconds, for the limit on the whole measurement."""


class CudaClock:
    """CUDA events on the current stream of the current device.

    The flush writes a buffer of four times the L2, as triton's do_bench does, twice. The GPU is busy with it while the
    host launches the call, so that a sample holds no launch overhead of the host.

    Raises:
        DepthwiseError: torch finds no GPU.
    """

    def __init__(self) -> None:
        torch = require_gpu()
        device = torch.cuda.current_device()
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._torch = torch
        self._buffer = torch.empty(
            max(_LEAST_FLUSH_BYTES, FLUSH_L2_SIZES * l2_bytes) // 4, dtype=torch.int32, device=f"cuda:{device}"
        )

    def flush(self) -> None:
        for _ in range(FLUSH_WRITES):
            self._buffer.zero_()

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def now(self) -> float:
        return time.perf_counter()


def require_gpu() -> Any:
    """torch, if it has a GPU.

    Raises:
        DepthwiseError: it has none.
    """
    import torch

    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise DepthwiseError(
            f"timing needs a GPU, but {built}: run it on a machine with an NVIDIA GPU, or use `dwconv explain` for "
            "predicted times"
        )
    return torch


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    limit_seconds: float = LIMIT_SECONDS,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Times every contender once a round, each call with a cold L2, and returns their statistics in seconds.

    A slow drift of the GPU's clocks meets all contenders alike, because each round calls all of them; the first of a
    round changes from round to round.

    Args:
        contenders: calls to time, by name. Each launches its work on the current stream and returns.
        rounds: samples of each contender.
        warmup: untimed calls of each before the first round; what they compile or allocate is not counted. There is
            one only where it takes more than a tenth of `limit_seconds`.
        limit_seconds: no further round starts after this time, once there are LEAST_ROUNDS of them.
        progress: is called with (rounds that are done, rounds) after every round.
        clock: where times come from; default a CudaClock.

    Raises:
        DepthwiseError: there is no GPU, no contender, or rounds < 1.

    Example, on a GPU:
        times = measure({"ours": lambda: dwconv.conv2d(x, weight), "copy": copy_contender(2 * x.nbytes, x.device)})
        print(times["copy"].median / times["ours"].median)
    """
    if not contenders:
        raise DepthwiseError("nothing to time: give one contender or more")
    if rounds < 1:
        raise DepthwiseError(f"rounds={rounds} takes no samples: use 1 or more, 25 for a figure to report")
    clock = CudaClock() if clock is None else clock
    began = clock.now()
    for run in contenders.values():
        started = clock.now()
        for _ in range(warmup):
            run()
            clock.synchronize()
            if clock.now() - started > limit_seconds / 10:
                break
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock.now() - began > limit_seconds:
            break
        first = done % len(names)
        events = []
        for name in names[first:] + names[:first]:
            clock.flush()
            start = clock.mark()
            contenders[name]()
            events.append((name, start, clock.mark()))
        clock.synchronize()
        for name, start, end in events:
            samples[name].append(clock.seconds(start, end))
        if progress is not None:
            progress(done + 1, rounds)
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def copy_contender(total_bytes: int, device: torch.device | str | int) -> Callable[[], object]:
    """A device-to-device `copy_` that moves total_bytes: half of them read, half written.

    The yardstick of a problem whose least traffic is total_bytes. Each half is rounded up to 16 bytes; two buffers of
    half the size are allocated.
    """
    import torch

    half = max(16, -(-total_bytes // 32) * 16)
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    return copy
