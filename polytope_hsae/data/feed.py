"""How training rows reach a GPU in time: they lie there if they fit, else a thread sends them ahead of the trainer.

Both give the batches that a RowStream gives, in the same order.
Shapes: B batch, d residual width.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polytope_hsae.data.store import ActivationStore, ResidentStore
from polytope_hsae.data.stream import RowStream

SHARE = 0.5  # of a GPU's free memory that rows may take
AHEAD = 2  # batches read ahead: one on its way to the GPU, one being read


def place(store: ActivationStore, device: str | torch.device, reserved: int) -> ActivationStore:
    """The store for training on a device: on a GPU a `ResidentStore`, if the rows of train and val fit; else as it is.

    They fit if they take at most `SHARE` of the free memory less `reserved`, the bytes of models and optimisers.
    """
    if torch.device(device).type != "cuda":
        return store
    torch.cuda.empty_cache()  # PyTorch's cache counts as free
    free, _ = torch.cuda.mem_get_info(device)
    fits = store.n_bytes("train") + store.n_bytes("val") <= SHARE * (free - reserved)
    return ResidentStore(store, device) if fits else store


@contextmanager
def feed(stream: RowStream, device: str | torch.device) -> Iterator["RowStream | Prefetch"]:
    """The stream for a trainer on a device: read ahead, if its rows have to come to a GPU."""
    device = torch.device(device)
    if device.type == stream.store.device.type:
        yield stream
        return
    ahead = Prefetch(stream, device)
    try:
        yield ahead
    finally:
        ahead.close()


class _Batch(NamedTuple):
    rows_Bd: Tensor
    state: dict[str, Any]  # of the stream, after this batch
    copied: torch.cuda.Event | None


class Prefetch:
    """A stream whose next batches a thread reads, and on a GPU copies there beside the work that goes on.

    An error in the thread is raised by the `next` that would have given its batch.
    """

    def __init__(self, stream: RowStream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._state = stream.state_dict()
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._pending: deque[Future[_Batch]] = deque()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self) -> Tensor:
        """The next batch, float32 [B,d], on the device."""
        while len(self._pending) <= AHEAD:
            self._pending.append(self._reader.submit(self._read))
        rows_Bd, self._state, copied = self._pending.popleft().result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            rows_Bd.record_stream(current)  # else its memory could be reused while the trainer's work is queued
        return rows_Bd

    def _read(self) -> _Batch:
        stream = self.stream
        if self._copies is None:
            return _Batch(stream.next(), stream.state_dict(), None)
        with torch.cuda.stream(self._copies):
            stored_Bd = stream.store.stored(stream.split, stream.next_rows(), pinned=True)
            rows_Bd = stored_Bd.to(self.device, non_blocking=True).float()
            return _Batch(rows_Bd, stream.state_dict(), self._copies.record_event())

    def state_dict(self) -> dict[str, Any]:
        """The stream's, after the last batch that was given; what was read ahead does not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As RowStream's; what was read ahead is dropped."""
        wait(self._pending)
        self._pending.clear()
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()

    def close(self) -> None:
        """End the thread, after the batch that it is reading."""
        self._reader.shutdown(cancel_futures=True)
