"""A step recorded once and then replayed, for GPUs that are faster than the host can launch."""

from collections.abc import Callable, Sequence

import torch


class Recorded:
    """A function of tensors, recorded as a CUDA graph at its second call and replayed since.

    The first call is an ordinary one: libraries choose their algorithms, optimizers make their
    state. What the function does to tensors outside, each replay does too; what it does in Python,
    the first two calls do alone. Tensors it leaves behind hold the results of the last replay.

    Args:
        function: called with tensors of the same shapes and types each time; never waits for the
            device.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor) -> None:
        """Do what the function does; returns before the device has done it."""
        if self._inputs is None:
            self._inputs = [torch.empty_like(values) for values in inputs]
            # On the stream that it is recorded on: gradients are added up on that of a first use.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._function(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._function(*self._inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
