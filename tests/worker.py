"""Programs that tests start on several processes: `python -m tests.worker NAME [arguments]`."""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def evaluate_sizes(out: str) -> None:
    """Evaluate sets of 1 to 65 images; rank 0 writes the counts and confusion matrices."""
    import cifar_dist.data.batches as batches
    from cifar_dist.config import AugmentConfig, TrainConfig
    from cifar_dist.data.augment import Pixels
    from cifar_dist.data.batches import build_evaluation_loader
    from cifar_dist.data.synthetic import draw
    from cifar_dist.processes.start import leave_processes, start_processes
    from cifar_dist.training.engine import evaluate

    batches.EVALUATION_BATCH = 8  # the sets then have several batches and an incomplete one
    accelerator, peers = start_processes(TrainConfig())
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    pixels = Pixels((0.5,) * 3, (0.25,) * 3, AugmentConfig(), 0)
    images = draw(65, 8, seed=(0,))
    counted = []
    for size in range(1, 66):
        loader = build_evaluation_loader(accelerator, images.limited(size, seed=size))
        result = evaluate(accelerator, network, loader, pixels, classes=10)
        counted.append(
            [size, result.totals.count, result.totals.correct, result.confusion.tolist()]
        )
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(counted))
    peers.leave()
    leave_processes()


def fall_back(checkpoints: str, times: str) -> None:
    """Damage each file of the newest checkpoint in many ways; print what all ranks then load."""
    import hashlib
    import random

    from accelerate.utils import gather_object

    from cifar_dist.config import TrainConfig
    from cifar_dist.processes.start import leave_processes, on_main_process, start_processes
    from cifar_dist.storage.checkpoint import checkpoints_in, load_newest

    accelerator, peers = start_processes(TrainConfig())
    chance, chosen = random.Random(5), []
    newest = checkpoints_in(Path(checkpoints))[-1]
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        accelerator.wait_for_everyone()
        for number in range(2 * int(times)):
            hurt = bytearray(whole)
            if number % 2:
                del hurt[chance.randrange(len(hurt)) :]
            else:
                hurt[chance.randrange(len(hurt))] ^= 1 << chance.randrange(8)
            if accelerator.is_main_process:
                file.write_bytes(hurt)
            found = on_main_process(accelerator, lambda: load_newest(Path(checkpoints)))
            assert found is not None
            digest = hashlib.sha256(str(found[1].progress).encode())
            for part in found[1].files().values():
                for tensor in part.values():
                    digest.update(tensor.numpy().tobytes())
            chosen.append(f"{found[0].name} {digest.hexdigest()}")
        if accelerator.is_main_process:
            file.write_bytes(whole)
    everyone = gather_object([chosen])
    if accelerator.is_main_process:
        agreed = all(other == chosen for other in everyone)
        print(json.dumps([len(chosen), sorted(set(chosen)), agreed, len(everyone)]), flush=True)
    peers.leave()
    accelerator.wait_for_everyone()
    leave_processes()


def record_positions(folder: str, stop_at: str, *arguments: str) -> None:
    """Train, and record the sample positions of each step; exit after step `stop_at`, if not 0."""
    from cifar_dist.data.augment import Pixels
    from cifar_dist.train import main
    from cifar_dist.training import run

    rank = os.environ.get("RANK", "0")
    original, seen = Pixels.for_training, []

    def for_training(self: Pixels, batch: Any, epoch: int) -> torch.Tensor:
        seen.append(batch.positions.tolist())
        return original(self, batch, epoch)

    Pixels.for_training = for_training  # type: ignore[method-assign]
    train_epoch = run.train_epoch

    def recorded(accelerator: Any, state: Any, *others: Any) -> Any:
        for result in train_epoch(accelerator, state, *others):
            with open(f"{folder}/{rank}.jsonl", "a") as file:
                for positions in seen:
                    file.write(json.dumps([state.step, positions]) + "\n")
            seen.clear()
            if state.step == int(stop_at):
                saved = Path(arguments[arguments.index("--out") + 1], "checkpoints/step-00000004")
                while not saved.exists():  # it is written by a background thread
                    time.sleep(0.01)
                accelerator.wait_for_everyone()
                os._exit(9)
            yield result

    run.train_epoch = recorded  # type: ignore[assignment]
    sys.exit(main(arguments))


def show_threads() -> None:
    """Print the number of threads of each process."""
    from cifar_dist.config import TrainConfig
    from cifar_dist.processes.start import leave_processes, start_processes

    peers = start_processes(TrainConfig())[1]
    os.write(
        1, f"threads={torch.get_num_threads()}\n".encode()
    )  # one write, so that lines do not mix
    peers.leave()
    leave_processes()


def count_bytes(out: str, *arguments: str) -> None:
    """Train, and write number and bytes of collectives per step, except the first of an epoch."""
    import math

    from cifar_dist.train import main
    from cifar_dist.training import run

    train_epoch, sent = run.train_epoch, []

    def counted(*arguments: Any) -> Any:
        with torch.profiler.profile(record_shapes=True) as profile:
            for result in train_epoch(*arguments):
                with torch.profiler.record_function("a step has ended"):
                    pass
                yield result
        events = profile.events() or []
        ends = sorted(e.time_range.start for e in events if e.name == "a step has ended")
        for began, ended in pairwise(ends):
            shapes = [
                shape
                for e in events
                if e.name.startswith("gloo:") and began < e.time_range.start < ended
                for shape in e.input_shapes
            ]
            sent.append([len(shapes), sum(4 * math.prod(shape) for shape in shapes)])

    run.train_epoch = counted  # type: ignore[assignment]
    code = main([*arguments, "--track.every_steps", "0"])
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(sent))
    sys.exit(code)


def train_without(what: str, *arguments: str) -> None:
    """Train without the all-reduce of gradients, without its mean, or without that of the loss."""
    from cifar_dist.train import main
    from cifar_dist.training import metrics, run

    if what in ("gradients", "mean"):
        open_session = run.open_session

        def summed(buffer: torch.Tensor) -> Any:
            work: Any = torch.distributed.all_reduce(buffer, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        def changed(*arguments: Any) -> Any:
            opened = open_session(*arguments)
            model: Any = opened.state.model
            if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
                return opened  # the single process is the reference
            if what == "mean":
                model.register_comm_hook(None, lambda state, bucket: summed(bucket.buffer()))
            else:
                model.require_backward_grad_sync = False
            return opened

        run.open_session = changed
    else:
        totals = metrics.Tally.totals

        def own(self: metrics.Tally, accelerator: Any) -> metrics.Totals:
            with mock.patch.object(metrics, "reduce_sum", lambda accelerator, values: values):
                return totals(self, accelerator)

        metrics.Tally.totals = own  # type: ignore[method-assign]
    sys.exit(main(arguments))


def hang_in_doctor(rank: str, *arguments: str) -> None:
    """Run the doctor; one rank does not reach the first all-reduce."""
    from cifar_dist.launching import doctor

    def late(*arguments: Any) -> dict[str, Any]:
        time.sleep(600)
        return {}

    doctor.STAGE_SECONDS = 5
    if os.environ["RANK"] == rank:
        doctor.STAGES["in the first all-reduce"] = late
    sys.exit(doctor.main(arguments))


def fail_on(rank: str, *arguments: str) -> None:
    """Train; one rank raises in the first step."""
    from cifar_dist.data.augment import Pixels
    from cifar_dist.train import main

    def broken(*arguments: Any) -> torch.Tensor:
        raise ZeroDivisionError("the bug in question")

    if os.environ["RANK"] == rank:
        Pixels.for_training = broken  # type: ignore[assignment]
    sys.exit(main(arguments))


def speak(*arguments: str) -> None:
    """Train; every process prints to stdout and stderr at each step."""
    from cifar_dist.train import main
    from cifar_dist.training import run

    train_epoch, rank = run.train_epoch, os.environ["RANK"]

    def speaking(*arguments: Any) -> Any:
        for result in train_epoch(*arguments):
            print(f"output of rank {rank}")
            print(f"errors of rank {rank}", file=sys.stderr)
            yield result

    run.train_epoch = speaking  # type: ignore[assignment]
    sys.exit(main(arguments))


if __name__ == "__main__":
    programs = (
        *(count_bytes, evaluate_sizes, fail_on, fall_back, hang_in_doctor, record_positions),
        *(show_threads, speak, train_without),
    )
    {program.__name__: program for program in programs}[sys.argv[1]](*sys.argv[2:])
