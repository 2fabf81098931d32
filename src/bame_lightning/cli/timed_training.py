"""Several trainings that take turns, a step each, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import io
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule
from bame_lightning.callbacks.driver import SparseCallback


class Fit(NamedTuple):
    """A training to measure."""

    module: L.LightningModule
    callbacks: list[L.Callback]
    batch: list[Tensor]
    """Of every step."""


CYCLE = 20
"""Steps in which BAME's default does everything: it reads all blocks in every 20th step, and adapts after every second."""
FOREVER = Schedule(0, 10**6)

# Threads of one process would share its allocator and the interpreter's lock, and slow each other down between turns.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PROCESSES: Any = multiprocessing.get_context(_START)
if _START == "forkserver":
    _PROCESSES.set_forkserver_preload([__name__])  # imports torch and Lightning once for all


@dataclass(frozen=True)
class Times:
    """Times of a method's steps, and memory of its callbacks.

    Args:
        seconds: Time of each step, from the start of a cycle.
        logging: Seconds for metrics, in a step that logs.
        weights: Number of sparse weights.
        held: Bytes that the callbacks hold in tensors.
        saved: Bytes that they add to a checkpoint.
        peak: The most bytes by which memory grew, on the GPU if there is one; None if the system does not tell.
    """

    seconds: list[float]
    logging: float
    weights: int
    held: int
    saved: int
    peak: int | None

    def ratios(self, dense: Times) -> list[float]:
        """Time of each step of a cycle over the dense step beside it: the median over cycles."""
        pairs = [mine / other for mine, other in zip(self.seconds, dense.seconds, strict=True)]
        return [statistics.median(pairs[step::CYCLE]) for step in range(CYCLE)]

    def summary(self, dense: Times) -> dict[str, float | None]:
        """Milliseconds of a step; ratios to dense training of all steps and of each kind of BAME's; memory."""
        ratios, weights = self.ratios(dense), max(1, self.weights)
        return {
            "median_ms": 1e3 * statistics.median(self.seconds),
            "over_dense": statistics.mean(ratios),
            "reads_all": ratios[0],
            "adapts_all": ratios[1],
            "reads_some": statistics.median(ratios[2::2]),
            "adapts_some": statistics.median(ratios[3::2]),
            "logging_ms": 1e3 * self.logging,
            "held_bytes_a_weight": self.held / weights,
            "saved_bytes_a_weight": self.saved / weights,
            "peak_mib": None if self.peak is None else self.peak / 2**20,
        }


def take_turns(fits: Mapping[str, Callable[[], Fit]], cycles: int) -> dict[str, Times]:
    """Train with several methods at once, each in a process of its own, a step of each in turn.

    Args:
        fits: By name, functions that make what to train; they must be picklable.
        cycles: Cycles of `CYCLE` steps to measure, after one that is not measured.

    Returns:
        Times by name.

    Raises:
        ChildProcessError: If a process ended without a message.
        Exception: An error that any of them raised.
    """
    turns = [_PROCESSES.Semaphore(0) for _ in fits]
    names, processes = dict[Any, str](), []
    for place, (name, fit) in enumerate(fits.items()):
        result, sender = _PROCESSES.Pipe(duplex=False)
        names[result] = name
        turn = _Turn(turns[place], turns[(place + 1) % len(turns)])
        # A daemon: processes that wait for a failed one must not outlive this process.
        process = _PROCESSES.Process(
            target=_train, args=(fit, (cycles + 1) * CYCLE, torch.get_num_threads(), turn, sender), daemon=True
        )
        process.start()
        sender.close()  # this copy, so that the end of the process ends the connection
        processes.append(process)
    turns[0].release()
    found = dict[str, Times]()
    try:
        while len(found) < len(fits):
            for ready in wait([result for result, name in names.items() if name not in found]):
                found[names[ready]] = _receive(ready, names[ready])
    finally:
        for process in processes:
            process.kill()  # Lightning waits for the end of a batch when told to terminate
            process.join()
    return {name: found[name] for name in fits}


def _receive(result: Any, name: str) -> Times:
    try:
        times = result.recv()
    except EOFError:
        raise ChildProcessError(
            f"The process that trained `{name}` ended without a word; the system may have run out of memory. Measure with a "
            "smaller `batch_size`."
        ) from None
    if isinstance(times, Exception):
        raise times
    return times  # type: ignore[no-any-return]


class _Turn(L.Callback):
    """Waits for its turn before each step, so that only one training runs at any time.

    One thread is timed by the processor time of its process, which other processes hardly change. Several threads are timed by
    the clock on the wall, because waiting threads use processor time, too.
    """

    def __init__(self, mine: Semaphore, following: Semaphore) -> None:
        self.seconds: list[float] = []
        self._mine, self._following = mine, following
        self._began = 0.0

    def take(self) -> None:
        self._mine.acquire()
        alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
        self._clock = time.process_time if alone else time.perf_counter
        self._began = self._clock()

    def hand_on(self) -> None:
        self._following.release()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(self._clock() - self._began)
        if trainer.global_step < trainer.max_steps:  # the other trainings need not wait for what follows the last step
            self.hand_on()
            self.take()


def _train(fit: Callable[[], Fit], steps: int, threads: int, turn: _Turn, result: Connection) -> None:
    """Be the process that trains with one method."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before = _largest()
    turn.take()
    try:
        module, callbacks, batch = fit()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            L.Trainer(
                max_steps=steps,
                callbacks=[turn, *callbacks],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
        result.send(_times(turn.seconds[CYCLE:], callbacks, before))
    except Exception as error:
        result.send(error)
    turn.hand_on()


def _times(seconds: list[float], callbacks: list[L.Callback], before: int | None) -> Times:
    largest = _largest()
    peak = None if largest is None or before is None else largest - before
    sparse = [callback for callback in callbacks if isinstance(callback, SparseCallback)]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(sparse)}
    for callback in sparse:
        # A view of memory that belongs to the model or the optimizer.
        others = [weight.values for weight in callback.weights]
        others += [t for each in callback.training.run.holders for t in _tensors(dict(each.optimizer.state))]
        for tensor in others:
            held.pop(tensor.untyped_storage().data_ptr(), None)
    began = time.perf_counter()
    for callback in sparse:
        callback.method.metrics()
    metrics = time.perf_counter() - began
    saved = io.BytesIO()
    torch.save([callback.state_dict() for callback in sparse], saved)
    weights = sum(weight.kept.numel() for callback in sparse for weight in callback.weights)
    size = len(saved.getbuffer()) if sparse else 0
    return Times(seconds, metrics, weights, sum(held.values()), size, peak)


def _largest() -> int | None:
    """The largest memory of this process so far, in bytes. `getrusage` would count its parent process, too."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Find all tensors that an object of this package holds, except parameters; objects may hold each other."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("bame_lightning") and hasattr(value, "__dict__") and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(vars(value), seen)
