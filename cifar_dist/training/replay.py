"""A step recorded as a CUDA graph, for GPUs that are faster than the host launches kernels."""

from collections.abc import Callable, Sequence

import torch


class Recorded:
    """A function of tensors that is captured in a CUDA graph at its second call, then replayed.

    The first call runs eagerly, so that libraries choose their algorithms and the optimizer creates
    its state. Each replay repeats the kernels of the function, including those that change tensors
    outside of it. Python code runs in the first two calls only. Tensors that the function creates
    hold the results of the last replay.

    Args:
        function: called with tensors of the same shapes and dtypes each time; must not wait for
            the device.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor) -> None:
        """Run the function or replay it; returns before the device has finished."""
        if self._inputs is None:
            self._inputs = [torch.empty_like(values) for values in inputs]
            # On the stream of the capture, because autograd accumulates each gradient on the stream
            # of its first use.
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
