"""How a sweep's runs are made: one after the other in this process, or several at once in worker processes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..phases.run import keep_freed_memory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a sweep is run; nothing of it changes a result.

    only: an arm or a glob of HOOK/RUN; limit: runs made now; device: one, or several with commas; cache: None is a
    folder of the sweep's.
    """

    only: str | None
    limit: int | None
    workers: int
    test: bool
    device: str
    cache: Path | None


class _Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def worker_pool(
    workers: int, start: Callable[[int, Any], None], argument: Any, name: str, kept: str = ""
) -> Iterator[Executor]:
    """So many processes, each of which begins with `start(number, argument)`; a single worker is this process.

    Only this process writes records, so that none is half-written when the workers are ended with it. Raises OSError,
    naming the command `name` and what is kept, if one is killed.
    """
    if workers == 1:
        keep_freed_memory()
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _begin, (start, argument, numbers)) as pool:
        try:
            yield pool
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()  # they ignore signals that ask, so that the pool would wait for the end of their runs
            if isinstance(error, BrokenProcessPool):
                raise OSError(f"{name}: a worker was killed (out of memory?), try fewer --workers{kept}") from error
            raise


def _begin(start: Callable[[int, Any], None], argument: Any, numbers: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all; the parent process ends its workers
    keep_freed_memory()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    start(number, argument)


def threads_each(workers: int, most: int) -> int:
    """Threads of each of so many processes that share the CPU: `most` (run.threads), or its share of the cores."""
    return max(1, min(most, (os.cpu_count() or 1) // workers))


def results(pool: Executor, work: Callable[..., Any], ready: Callable[[], Iterable[tuple[Any, ...]]]) -> Iterator[Any]:
    """What the calls of `work` return, each as soon as it is there, until none is left.

    ready: the arguments of the calls that can start now, each given once; asked again after results have been taken.
    """
    pending: set[Future[Any]] = set()
    while True:
        pending |= {pool.submit(work, *arguments) for arguments in ready()}
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
