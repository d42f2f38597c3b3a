"""Measure time and accuracy of the tutorials' script and of the recipe `quick`.

`python -m benchmarks.time_to_accuracy [--rounds N] [--root FOLDER]`

Both start without a cache of decoded images, one after the other in each round. The script is that
of the tutorials: Pillow, ToTensor, DataLoader, ten epochs of SGD at 0.01 and batch 64, each
followed by a test, TensorBoard and a saved model. It uses the decoder of cifar-dist, which is
faster than its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data import add_options, as_tensors, data_options, load, same_places
from benchmarks.harness import RESULTS, median, paired, record, spread, table

SCRIPT, QUICK = "the tutorials' script", "quick"


def script(options: argparse.Namespace) -> None:
    """Train as the tutorials do, and print the accuracy and the seconds of the loop."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter
    from torchvision.transforms import ToTensor

    from benchmarks.peers import PillowImages
    from cifar_dist.models.catalogue import MODELS

    dataset = load(options)
    loaders = {
        split: DataLoader(
            PillowImages(*as_tensors(dataset, split), ToTensor()), 64, shuffle=split == "train"
        )
        for split in ("train", "test")
    }
    network, loss_of = MODELS["tutorial"](len(dataset.classes)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    writer = SummaryWriter(options.out / "logs")
    began = time.perf_counter()
    for epoch in range(options.epochs):
        network.train()
        for step, (images, labels) in enumerate(loaders["train"]):
            loss = loss_of(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                writer.add_scalar("train_loss", loss.item(), epoch * len(loaders["train"]) + step)
        network.eval()
        total, correct = 0.0, 0
        with torch.no_grad():
            for images, labels in loaders["test"]:
                logits = network(images)
                total += loss_of(logits, labels).item()
                correct += int((logits.argmax(1) == labels).sum())
        accuracy = correct / len(loaders["test"].dataset)
        writer.add_scalar("test_loss", total, epoch)
        writer.add_scalar("test_accuracy", accuracy, epoch)
        torch.save(network, options.out / f"model_{epoch}.pth")
    writer.close()
    print(json.dumps({"accuracy": accuracy, "train_wall": time.perf_counter() - began}))


def quick(options: argparse.Namespace) -> None:
    """Train `quick`, and print accuracy and seconds from the first step to the checkpoint."""
    from cifar_dist.config import parse_recipe
    from cifar_dist.train import run
    from cifar_dist.training import run as story
    from cifar_dist.training import session

    open_session, began = story.open_session, list[float]()

    def timed(*arguments: object) -> session.Session:
        opened = open_session(*arguments)  # type: ignore[arg-type]
        began.append(time.perf_counter())
        return opened

    story.open_session = timed
    recipe, _ = parse_recipe(
        ["--config", "quick", *data_options(options), "--out", str(options.out / "run")]
    )
    accuracy = run(recipe).metrics["test"]["accuracy"]
    print(json.dumps({"accuracy": accuracy, "train_wall": time.perf_counter() - began[0]}))


def cold(subject: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one subject without a cache of decoded images, and return its times and accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        options.cache = f"{folder}/cache"
        own = ["--subject", subject, "--out", folder, "--epochs", str(options.epochs)]
        began, used = time.perf_counter(), os.times()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.time_to_accuracy", *own, *same_places(options)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall, now = time.perf_counter() - began, os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall, "cpu": cpu}


def main() -> None:
    """Measure, and write results/time-to-accuracy.md and .json."""
    parser = argparse.ArgumentParser("benchmarks.time_to_accuracy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="of the tutorials' script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--subject", choices=[SCRIPT, QUICK], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.subject:
        (script if options.subject == SCRIPT else quick)(options)
        return
    rounds: dict[str, list[dict[str, float]]] = {SCRIPT: [], QUICK: []}
    for number in range(options.rounds):
        for name in rounds if number % 2 else reversed(rounds):
            rounds[name].append(cold(name, options))
        newest = {name: reports[-1] for name, reports in rounds.items()}
        print(f"round {number + 1} of {options.rounds}: {newest}", file=sys.stderr, flush=True)
    rows = [
        [
            name,
            f"{median(rounds, name, 'accuracy'):.4f}",
            *(f"{median(rounds, name, key):.1f}" for key in ("train_wall", "wall", "cpu")),
            *(
                "1/" + spread(paired(rounds, name, SCRIPT, key), 1)
                for key in ("train_wall", "wall", "cpu")
            ),
        ]
        for name in rounds
    ]
    head = ["", "accuracy", "seconds of training", "seconds of the command", "CPU seconds"]
    head += ["training / script", "command / script", "CPU / script"]
    record(
        options.results,
        "time-to-accuracy",
        f"The tutorials' script ({options.epochs} epochs) and `quick`, {options.rounds} rounds",
        table(head, rows),
        {"epochs": options.epochs, "rounds": rounds},
    )


if __name__ == "__main__":
    main()
