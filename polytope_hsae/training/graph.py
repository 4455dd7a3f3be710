"""A training step's work on the GPU as one CUDA graph: short steps then cost what the GPU needs, not the launches."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps as usual before the capture: kernels are compiled and libraries started by then


class StepGraph:
    """Runs `work` on a batch; from the fourth batch of one key on by replaying a graph of it.

    `work` must be the same for equal keys but for the numbers in tensors that it reads, must not wait for the GPU, and
    its results are overwritten by the next batch. Work with the key None always runs as usual.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.key: object = None
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # Autograd remembers the stream of a parameter's first use, and a capture allows no stream but its own.
        self.stream = torch.cuda.Stream()

    def __call__(self, key: object, work: Callable[[Tensor], object], rows_Bd: Tensor) -> object:
        if key != self.key or (self.graph is not None and rows_Bd.shape != self.rows_Bd.shape):
            self.key, self.runs, self.graph = key, 0, None
        self.runs += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            usual = key is None or self.runs <= WARM_UP
            result = work(rows_Bd) if usual else self._replay(work, rows_Bd)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _replay(self, work: Callable[[Tensor], object], rows_Bd: Tensor) -> object:
        if self.graph is None:
            self.rows_Bd = rows_Bd.clone()
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            # Other threads may use the GPU meanwhile: one may be sending rows there.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = work(self.rows_Bd)
        self.rows_Bd.copy_(rows_Bd)
        self.graph.replay()
        return self.result
