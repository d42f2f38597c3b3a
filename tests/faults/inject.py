"""Inject faults into a training process before it trains.

`python -m tests.faults.inject "NAME ARGUMENT..." [options of cifar_dist.train]` works under any
launcher. A fault that the test must wait for creates the file $FAULT_MARK first.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK = "RANK"


def inject(fault: str) -> None:
    """Inject the fault `NAME ARGUMENT...`, or several joined by " and "."""
    for one in fault.split(" and "):
        name, *arguments = one.split()
        globals()[name](*arguments)


def raises(step: str, rank: str) -> None:
    """Raise an unexpected exception."""

    def act(state: Any) -> None:
        raise ValueError("injected")

    _after_step(int(step), rank, act)


def loses_privileges() -> None:
    """Make root obey file modes, as other users must, by dropping capabilities."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return
    libc, drop_from_bounding_set = ctypes.CDLL(None), 24
    capabilities = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for number in capabilities:
        libc.prctl(drop_from_bounding_set, number, 0, 0, 0)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for number in capabilities:
        for which in range(3):  # effective, permitted, inheritable
            sets[which] &= ~(1 << number)
    assert libc.capset(header, sets) == 0


def is_killed(step: str, rank: str) -> None:
    """SIGKILL this process."""
    _after_step(int(step), rank, lambda state: os.kill(os.getpid(), signal.SIGKILL))


def launcher_is_stopped(step: str, rank: str) -> None:
    """SIGTERM the launcher of this process."""
    _after_step(int(step), rank, lambda state: os.kill(os.getppid(), signal.SIGTERM))


def hangs(step: str, rank: str) -> None:
    """Sleep for ever."""
    _after_step(int(step), rank, lambda state: time.sleep(1000))


def drifts(step: str, rank: str) -> None:
    """Flip the last bit of one weight."""

    def act(state: Any) -> None:
        bias = list(state.network.parameters())[-1].data.view(torch.int32)
        bias[0] ^= 1

    _after_step(int(step), rank, act)


def misses_a_step(step: str, rank: str) -> None:
    """Skip the optimizer step after `step`."""

    def act(state: Any) -> None:
        call = state.optimizer.step

        def once(*arguments: Any) -> None:
            state.optimizer.step = call

        state.optimizer.step = once

    _after_step(int(step), rank, act)


def bad_image(position: str, kind: str) -> None:
    """Make one training image produce a non-finite value.

    Args:
        kind: "nan" in its pixels; "loss", an infinite loss with finite gradients; or "gradient",
            infinite gradients with a finite loss.
    """
    from cifar_dist.data.augment import Pixels
    from cifar_dist.training import session

    original, build, rows = Pixels.for_training, session.build_network, []

    def for_training(self: Any, batch: Any, epoch: int) -> torch.Tensor:
        images = original(self, batch, epoch)
        rows[:] = [batch.positions == int(position), batch.labels]
        if kind == "nan":
            images[rows[0]] = torch.nan
        return images

    def without_its_class(logits: torch.Tensor) -> torch.Tensor:
        is_label = torch.arange(logits.shape[1]) == rows[1][:, None]
        return logits.masked_fill(rows[0][:, None] & is_label, -torch.inf)

    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
            ctx.rows = rows[0]
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            touched = (gradient != 0).any(dim=1) & ctx.rows
            return gradient.masked_fill(touched[:, None], float("inf"))

    def build_network(*arguments: Any) -> torch.nn.Module:
        network = build(*arguments)
        change = {"gradient": BadGradient.apply, "loss": without_its_class}.get(kind)
        if change:
            network.register_forward_hook(
                lambda module, inputs, logits: (
                    change(logits) if rows and torch.is_grad_enabled() else logits
                )
            )
        return network

    Pixels.for_training = for_training  # type: ignore[method-assign]
    session.build_network = build_network  # type: ignore[assignment]


def ignores_found_inf() -> None:
    """Train with an optimizer of torch's that has no fused kernel."""
    from cifar_dist.training.optim import OPTIMIZERS

    OPTIMIZERS["sgd"] = lambda model, config: torch.optim.RMSprop(model.parameters(), config.lr)


def dies_at_write(number: str) -> None:
    """SIGKILL the whole job before the write operation with this number in the checkpoint store."""
    from cifar_dist import files
    from cifar_dist.storage import checkpoint

    left = [int(number)]

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            # Count only calls with a path or open file of a checkpoint.
            if any("/checkpoints" in str(one) for one in arguments if not isinstance(one, dict)):
                left[0] -= 1
                if left[0] == 0:
                    Path(os.environ.get("FAULT_MARK", os.devnull)).touch()
                    os.killpg(0, signal.SIGKILL)
            return function(*arguments, **options)

        setattr(module, name, call)

    count(os, "replace")
    count(shutil, "rmtree")
    count(files, "sync")
    count(files, "sha256_of")
    count(checkpoint, "save_file")


def slow_saving(seconds: str) -> None:
    """Sleep after writing each file of a checkpoint."""
    from cifar_dist.storage import checkpoint

    original = checkpoint.save_file

    def save_file(*arguments: Any) -> None:
        original(*arguments)
        _mark()
        time.sleep(float(seconds))

    checkpoint.save_file = save_file


def slow_evaluation(seconds: str) -> None:
    """Sleep before each batch of an evaluation, and use small batches."""
    from cifar_dist.data import batches
    from cifar_dist.data.augment import Pixels

    batches.EVALUATION_BATCH = 4
    original = Pixels.for_evaluation

    def for_evaluation(self: Any, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:  # a single image is the trace of the network's graph
            _mark()
            time.sleep(float(seconds))
        return original(self, images)

    Pixels.for_evaluation = for_evaluation  # type: ignore[method-assign]


def slow_decoding(seconds: str) -> None:
    """Sleep before decoding each image file."""
    from cifar_dist.data import decode

    original = decode.decode_image

    def decode_image(*arguments: Any) -> Any:
        _mark()
        time.sleep(float(seconds))
        return original(*arguments)

    decode.decode_image = decode_image


def slow_start(seconds: str, rank: str | None = None) -> None:
    """Sleep before the dataset is loaded."""
    from cifar_dist.training import run

    original = run.load_dataset
    if rank not in (None, os.environ.get(RANK)):
        return

    def load_dataset(*arguments: Any) -> Any:
        _mark()
        time.sleep(float(seconds))
        return original(*arguments)

    run.load_dataset = load_dataset


def killed_at_start(rank: str) -> None:
    """SIGKILL this process before the dataset is loaded."""
    from cifar_dist.training import run

    if os.environ.get(RANK) == rank:
        run.load_dataset = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def slow_report(seconds: str) -> None:
    """Sleep before printing the cause of a failure."""
    from cifar_dist import train

    original = train.print_ending

    def print_ending(*arguments: Any) -> None:
        time.sleep(float(seconds))
        original(*arguments)

    train.print_ending = print_ending


def slow_steps(seconds: str) -> None:
    """Sleep after every step."""

    def act(state: Any) -> None:
        if state.step >= 3:
            _mark()
        time.sleep(float(seconds))

    _after_step(None, None, act)


def events_in(place: str) -> None:
    """Let TensorBoard write to another folder, so that it can fail alone."""
    from accelerate.tracking import TensorBoardTracker

    original = TensorBoardTracker.__init__

    def initialise(self: Any, run_name: str, folder: Path, **options: Any) -> None:
        original(self, run_name, place, **options)

    TensorBoardTracker.__init__ = initialise


def broken_tracker() -> None:
    """Make the TensorBoard tracker raise from its third record on."""
    from accelerate.tracking import TensorBoardTracker

    original, calls = TensorBoardTracker.log, []

    def log(self: Any, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise ConnectionError("the tracker is gone")
        original(self, *arguments, **options)

    TensorBoardTracker.log = log


def clock_set_back() -> None:
    """Make the wall clock run backwards."""
    begin = time.time()
    time.time = lambda: begin - 1000 - time.monotonic()  # type: ignore[assignment]


def other_code(folder: str) -> None:
    """Make rank 1 hash a copy of the package that differs in one byte."""
    from cifar_dist.processes import peers

    if os.environ.get(RANK) == "1":
        copy = Path(folder)
        shutil.copytree(peers.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / "training/schedule.py").open("a") as file:
            file.write("#")
        peers.PACKAGE = copy


def joins_alone() -> None:
    """Make Accelerate silently train alone."""
    import accelerate

    def build(*arguments: Any, **options: Any) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        return original(*arguments, **options)

    original, accelerate.Accelerator = accelerate.Accelerator, build


def dies_of_pickles() -> None:
    """Exit when a pickle with a class or a function is unpickled."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            print(f"unpickled {arguments}", flush=True)
            os._exit(99)

    sys.addaudithook(hook)


def short_meeting(seconds: str) -> None:
    """Shorten the time to wait for the other processes."""
    from cifar_dist.processes import peers

    peers.MEETING_SECONDS = int(seconds)
    peers.Peers.compare.__defaults__ = (int(seconds),)


def never_comes(rank: str) -> None:
    """Hang before connecting to the other processes."""
    if os.environ.get(RANK) == rank:
        time.sleep(1000)


def _after_step(step: int | None, rank: str | None, act: Callable[[Any], None]) -> None:
    from cifar_dist.training import run

    original = run.train_epoch

    def train_epoch(accelerator: Any, state: Any, *others: Any) -> Any:
        for result in original(accelerator, state, *others):
            if step in (None, state.step) and rank in (None, os.environ.get(RANK, "0")):
                act(state)
            yield result

    run.train_epoch = train_epoch


def _mark() -> None:
    if mark := os.environ.get("FAULT_MARK"):
        Path(mark).touch()


if __name__ == "__main__":
    from cifar_dist.train import main

    inject(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
