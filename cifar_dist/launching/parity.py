"""Compare training on N processes with one process: `cifar-dist parity --processes 1,2,4 [recipe]`.

The real command trains a few steps of the recipe at each world size; then losses, gradient norms
and weights are compared. BatchNorm normalises the images of each process, so the exact reference
for N processes is one process with N times as many micro-batches.

Training amplifies rounding errors: with BatchNorm and a high learning rate a hundredfold per step.
The tolerance is therefore measured, by runs of one process whose initial weights differ in the last
bit. Whether such a bit flips a ReLU or a maximum is random, so there are several of these runs.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.command import run_verb
from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.errors import UsageError, require
from cifar_dist.launching.findings import Finding, error, note, show, warning
from cifar_dist.launching.options import Options
from cifar_dist.storage.folder import read_metrics

if TYPE_CHECKING:
    import torch
    from torch import nn

CONTROLS = 3  # runs of one process whose initial weights differ in the last bit
ROUNDING = 1e-6  # relative error of a sum in another order
ALLOWED = 20.0  # tolerance, as a multiple of the difference that rounding makes
CHAOS = 0.1  # difference by rounding, relative to the change of the weights, that hides bugs
TESTED = 256  # test images of each run
# An address, because the host name may not resolve.
ON_THIS_MACHINE = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]


@dataclass(frozen=True)
class Run:
    """Results of a short run.

    Attributes:
        losses, norms: training loss and gradient norm of each step.
        weights: after each step.
        facts: run.json.
    """

    losses: list[float]
    norms: list[float]
    weights: list[Mapping[str, torch.Tensor]]
    facts: Mapping[str, Any]


class TrainingFailed(Exception):
    """A run failed; the message is its error line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, compare, and return 0, or 2 if results differ."""
    return run_verb(compare, argv)


def compare(argv: Sequence[str], program: Sequence[str] = ("-m", "cifar_dist.train")) -> int:
    """Run the comparison of `main`.

    Args:
        argv: command line.
        program: arguments for Python that start the training.
    """
    parser = Options("parity", __doc__)
    parser.add_argument("--processes", default="1,2", metavar="N,N", help="world sizes to compare")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run")
    parser.add_argument("--json", action="store_true")
    options, own, recipe, _ = parser.read_recipe(argv)
    words = options.processes.split(",")
    numbers = sorted({int(word) for word in words if word.isdigit() and int(word) > 0})
    require(
        len(numbers) > 0 and len(numbers) == len(set(words)),
        f"--processes is '{options.processes}'; give numbers such as 1,2,4",
    )
    require(options.steps > 0, f"--steps is {options.steps}; give 1 or more")
    several = [number for number in numbers if number > 1]
    require(bool(several), "--processes names no number above 1 to compare with")
    shortened, remarks = _shorten(recipe, several, options.steps)
    short, _ = parse_recipe([*own, *shortened])
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(short, [*own, *shortened], Path(folder), program)
        if draws_random_numbers(_build(recipe, comparison.alone), recipe.data.side):
            remarks.append("dropout is off here, because each process draws its own masks")
        comparison.findings += [note("changed", what, "see docs/launching.md") for what in remarks]
        for number in several:
            comparison.judge(number)
    return show(comparison.findings, comparison.report, options.json)


class Comparison:
    """Trains on one process, measures rounding, and compares other world sizes with it.

    Args:
        recipe: of the short runs.
        options: command line that gives this recipe.
        folder: for the run folders.
        program: arguments for Python that start the training.

    Attributes:
        report: one line per comparison, by its name.
        findings: errors, warnings and notes.
    """

    def __init__(
        self, recipe: Recipe, options: Sequence[str], folder: Path, program: Sequence[str]
    ) -> None:
        self.recipe, self.options, self.folder, self.program = recipe, options, folder, program
        self.report: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self.alone = self._train(1)
        network = _begin(recipe, self.alone)
        require(
            not draws_random_numbers(network, recipe.data.side),
            f"{recipe.model.name} draws random numbers in training even with model.dropout 0, and "
            "each process draws its own; switch its random layers off with model.options",
        )
        self.normalised = has_batchnorm(network) and not recipe.train.sync_batchnorm
        self.begun = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        self.rounded = [folder / f"rounded-{number}.safetensors" for number in range(CONTROLS)]
        for path in self.rounded:
            _write_rounded(network, path)
        self.noise: dict[int, Difference] = {}

    def judge(self, number: int) -> None:
        """Train on `number` processes and compare with one process."""
        try:
            together = self._train(number)
        except TrainingFailed as failure:
            self.report[f"{number} processes"] = "failed"
            remedy = "read its message; the first failing rank is the cause"
            self.findings.append(error("failed", f"{number} processes: {failure}", remedy))
            return
        plain = f"{number} processes against 1"
        name = f"{plain} in {number} micro-batches" if self.normalised else plain
        parts = number if self.normalised else 1
        exact = self._train(1, parts) if parts > 1 else self.alone
        noise = self._measure_noise(exact, parts)
        difference = _differ(exact, together, self.begun)
        self.report[name] = difference.describe()
        self.findings += [
            error("differs", f"{name}: {what}", "that is a bug")
            for what in difference.beyond(noise)
        ]
        if self.normalised:
            self.report[plain] = _differ(self.alone, together, self.begun).describe()
            self.findings.append(
                note(
                    "batchnorm",
                    f"{plain}: each process normalises its own part of the batch, so this "
                    "difference is expected",
                    "on GPUs --train.sync_batchnorm true removes it",
                )
            )

    def _measure_noise(self, exact: Run, parts: int) -> Difference:
        """Return the difference that rounding makes, in batches of `parts` micro-batches.

        It depends on them, because BatchNorm over fewer values amplifies rounding errors more.
        """
        if parts not in self.noise:
            runs = [self._train(1, parts, "--model.weights", str(path)) for path in self.rounded]
            noise = largest([_differ(exact, run, self.begun) for run in runs])
            name = f"1 process in {parts} micro-batches" if parts > 1 else "1 process"
            self.report[f"{name}, the last bits of its first weights changed, {CONTROLS} runs"] = (
                noise.describe()
            )
            self.findings += noise.blur()
            self.noise[parts] = noise
        return self.noise[parts]

    def _train(self, processes: int, parts: int = 1, *options: str) -> Run:
        """Run the real command, with `parts` times as many micro-batches, and read its results.

        Raises:
            TrainingFailed: a run on several processes failed.
            UsageError: a run on one process failed, whatever the world size.
        """
        from cifar_dist.storage.checkpoint import checkpoints_in, load_checkpoint

        out = self.folder / f"{processes}-{parts}"
        launcher = [*ON_THIS_MACHINE, "--nproc_per_node", str(processes)]
        start = [sys.executable, *launcher * (processes > 1), *self.program]
        accumulated = ["--train.accumulate", str(self.recipe.train.accumulate * parts)]
        done = subprocess.run(
            [*start, *self.options, *accumulated, *options, "--out", str(out)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            words = (errors or lines or ["it exited without an error message"])[-1]
            failure = UsageError if processes == 1 else TrainingFailed
            raise failure(words.removeprefix("error: "))
        steps = [line for line in read_metrics(out) if line["split"] == "train_window"]
        run = Run(
            [line["loss"] for line in steps],
            [line["gradient_norm"] for line in steps],
            [load_checkpoint(path).model for path in checkpoints_in(out / "checkpoints")],
            json.loads((out / "run.json").read_text(encoding="utf-8")),
        )
        shutil.rmtree(out)  # weights and optimizer state of each step
        return run


def _shorten(recipe: Recipe, several: Sequence[int], steps: int) -> tuple[list[str], list[str]]:
    """Return options that make a run short and comparable, and a remark per visible change."""
    parts = math.lcm(*several) * recipe.train.accumulate
    batch = -(-recipe.train.batch_size // parts) * parts
    remarks = []
    if batch != recipe.train.batch_size:
        numbers = ", ".join(map(str, several))
        remarks.append(f"batches have {batch} images here, which divide among {numbers} processes")
    options = {
        "train.batch_size": batch,
        "data.limit_train": batch * steps,
        "data.limit_test": TESTED,
        "train.epochs": 1,
        "model.dropout": 0,
        "track.every_steps": 1,
        "track.log_with": "[]",
        "checkpoint.keep": steps,
        "checkpoint.every_steps": 1,
        "resume": "never",
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))], remarks


def draws_random_numbers(network: nn.Module, image_size: int) -> bool:
    """Return whether a forward pass in training mode draws from torch's random generator."""
    import torch

    before = torch.get_rng_state()
    with torch.no_grad():
        copy.deepcopy(network).train()(torch.zeros(2, 3, image_size, image_size))
    return not torch.equal(before, torch.get_rng_state())


def has_batchnorm(network: nn.Module) -> bool:
    """Return whether any layer normalises by the statistics of the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(layer, _BatchNorm) for layer in network.modules())


def _build(recipe: Recipe, run: Run) -> nn.Module:
    from cifar_dist.models.catalogue import build_network

    return build_network(recipe.model, len(run.facts["classes"]))


def _begin(recipe: Recipe, run: Run) -> nn.Module:
    """Return the network with the initial weights of a run."""
    import torch

    from cifar_dist.storage.weights import load_weights

    torch.manual_seed(recipe.train.seed)
    network = _build(recipe, run)
    if recipe.model.weights:
        load_weights(network, recipe.model.weights)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:  # set from the data before the first step
                parameter.copy_(run.weights[0][name])
    return network


def _write_rounded(network: nn.Module, path: Path) -> None:
    """Write the network's weights with the last bit changed, up or down at random."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            away = torch.randint_like(parameter, 2) * 2 - 1
            tensors[name] = torch.nextafter(parameter.detach(), away * torch.inf)
    save_file(tensors, path)


@dataclass(frozen=True)
class Difference:
    """Difference between two runs.

    Attributes:
        losses, norms: relative, by step.
        weights: by step and name, relative to the change of each tensor since the start.
        whole: the same for all weights together, by step.
    """

    losses: list[float]
    norms: list[float]
    weights: list[dict[str, float]]
    whole: list[float]

    def describe(self) -> str:
        """Describe the largest differences; those of weights after the first and last step."""
        loss, norm = max(self.losses), max(self.norms)
        ends = sorted({0, len(self.weights) - 1})
        weights = [
            f"{self.weights[step][name]:.1e} after step {step + 1} ({name})"
            for step, name in ((step, _furthest(self.weights[step])) for step in ends)
        ]
        return (
            f"loss within {loss:.1e} (step {self.losses.index(loss) + 1}), gradient norm within "
            f"{norm:.1e} (step {self.norms.index(norm) + 1}), weights within "
            f"{', '.join(weights)} of their change"
        )

    def blur(self) -> list[Finding]:
        """Report the step from which rounding hides smaller differences."""
        chaotic = [step for step, whole in enumerate(self.whole) if whole > CHAOS]
        if not chaotic:
            return []
        first = chaotic[0]
        level = note if first else warning  # earlier steps have a strict tolerance
        return [
            level(
                "chaotic",
                f"rounding alone makes {self.whole[first]:.1e} of the change of the weights after "
                f"step {first + 1}: smaller differences are hidden from there on",
                "a lower --optim.lr shows smaller differences",
            )
        ]

    def beyond(self, noise: Difference) -> list[str]:
        """Describe where this difference first exceeds that of rounding.

        Args:
            noise: the difference that rounding makes.
        """
        wrong = []
        pairs = {
            "loss": (self.losses, noise.losses),
            "gradient norm": (self.norms, noise.norms),
        }
        for what, (mine, rounded) in pairs.items():
            for step, value in enumerate(mine):
                if value > ALLOWED * max(ROUNDING, *rounded[: step + 1]):
                    wrong.append(f"the {what} differs first at step {step + 1}, by {value:.1e}")
                    break
        largest = ROUNDING
        for step, weights in enumerate(self.weights):
            largest = max(largest, *noise.weights[step].values())
            names = [name for name, value in weights.items() if value > ALLOWED * largest]
            if names:
                worst = _furthest(weights)
                wrong.append(
                    f"{len(names)} of {len(weights)} weights differ first after step {step + 1}, "
                    f"most of all {worst}: by {weights[worst]:.1e} of its change"
                )
                break
        return wrong


def _furthest(weights: Mapping[str, float]) -> str:
    """Return the name of the tensor with the largest difference."""
    return max(weights, key=lambda name: weights[name])


def _differ(expected: Run, found: Run, begun: Mapping[str, torch.Tensor]) -> Difference:
    """Compare two runs with the initial weights `begun`."""
    weights, whole = [], []
    for mine, theirs in zip(expected.weights, found.weights, strict=True):
        apart = {name: float((theirs[name] - mine[name]).norm()) for name in begun}
        moved = {name: float((mine[name] - start).norm()) for name, start in begun.items()}
        weights.append({name: apart[name] / max(moved[name], 1e-12) for name in begun})
        whole.append(math.hypot(*apart.values()) / math.hypot(*moved.values()))
    return Difference(
        [_relative(a, b) for a, b in zip(expected.losses, found.losses, strict=True)],
        [_relative(a, b) for a, b in zip(expected.norms, found.norms, strict=True)],
        weights,
        whole,
    )


def largest(found: Sequence[Difference]) -> Difference:
    """Return the largest difference of each kind."""
    return Difference(
        [max(values) for values in zip(*(one.losses for one in found), strict=True)],
        [max(values) for values in zip(*(one.norms for one in found), strict=True)],
        [
            {name: max(weights[name] for weights in same) for name in same[0]}
            for same in zip(*(one.weights for one in found), strict=True)
        ],
        [max(values) for values in zip(*(one.whole for one in found), strict=True)],
    )


def _relative(expected: float, found: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


if __name__ == "__main__":
    sys.exit(main())
