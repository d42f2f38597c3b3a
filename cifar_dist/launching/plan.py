"""Print what a launch would do, without a GPU and without starting it: `cifar-dist plan ...`.

It prints the command for each machine, steps and learning rates, memory, disk and network traffic,
and every error that can be found before the launch.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.command import command
from cifar_dist.config import Recipe
from cifar_dist.errors import require
from cifar_dist.launching.accelerate_config import AccelerateConfig, read_config
from cifar_dist.launching.checks import CAPABILITIES, Device, Endpoint, Facts, check
from cifar_dist.launching.facts import own_address
from cifar_dist.launching.findings import Finding, show, warning
from cifar_dist.launching.forecast import Prediction, predict, read_link, read_rate, step_seconds
from cifar_dist.launching.options import PORT, Options

FIRST = "FIRST_MACHINE"  # placeholder for an unknown address
TEMPLATES = Path(__file__).parents[2] / "launch"
ENGINES = ("accelerate", "torchrun", "ssh", "slurm", "kubernetes", "skypilot")


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, print the plan, and return the exit code."""
    options, own, recipe, origin = _parser().read_recipe(argv)
    config = read_config(options.accelerate_config)
    facts = _facts(options, config, recipe)
    findings = check(facts)
    started = commands(facts, options, own)
    report: dict[str, Any] = {"recipe": origin}
    if options.json or not options.engine:
        report |= started
    else:  # standard output is the input of the engine, and nothing else
        print("\n".join(started.values()).strip())
    if "batch" not in {finding.code for finding in findings}:
        prediction = predict(recipe, facts.processes)
        report |= _seconds(prediction, recipe, options)
        report |= _numbers(prediction, recipe) if options.json else _describe(prediction, recipe)
        findings += dropped(prediction)
    return show(findings, report, options.json, sys.stderr if options.engine else None)


def dropped(prediction: Prediction) -> Iterator[Finding]:
    """Check that an epoch uses most of the training images."""
    images = len(prediction.dataset.train)
    if prediction.left_over > images / 10:
        yield warning(
            "dropped",
            f"each epoch leaves out {prediction.left_over} of {images} training images, other ones "
            "each time, because the last incomplete batch is dropped",
            "use a smaller train.batch_size",
        )


def _parser() -> Options:
    parser = Options("plan", __doc__)
    parser.add_argument("--accelerate-config", metavar="YAML", help="as `accelerate config` writes")
    parser.add_argument("--machines", type=int, metavar="M")
    parser.add_argument(
        "--processes-per-machine", "--processes", type=int, metavar="P", help="one per GPU"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="launcher; default: accelerate, or torchrun on several machines",
    )
    parser.add_argument("--device", metavar="NAME", help="GPU to check for, such as 'Tesla T4'")
    parser.add_argument(
        "--like", metavar="RUN", help="run folder whose images per second per process are assumed"
    )
    parser.add_argument("--link", metavar="JSON", help="output of a live `doctor --json`")
    parser.add_argument("--json", action="store_true")
    return parser


def _facts(options: argparse.Namespace, config: AccelerateConfig, recipe: Recipe) -> Facts:
    asked = (options.machines, options.processes_per_machine)
    machines = config.machines if asked[0] is None else asked[0]
    per_machine = max(1, config.per_machine) if asked[1] is None else asked[1]
    for name, value in (("machines", machines), ("processes-per-machine", per_machine)):
        require(value >= 1, f"--{name} is {value}; give 1 or more")
    devices: list[Device] = []
    if options.device:
        known = [name for name in CAPABILITIES if name in options.device]
        require(
            bool(known),
            f"--device {options.device} is not known; name one of {', '.join(CAPABILITIES)}",
        )
        device = Device(0, options.device, capability=CAPABILITIES[max(known, key=len)])
        devices = [device] * per_machine
    port = config.values.get("main_process_port")
    host = str(config.values.get("main_process_ip") or FIRST)
    # The doctor, on that machine, checks whether the address can be reached.
    place = Endpoint(host, port, is_here=True) if isinstance(port, int) else None
    return Facts(
        machines=machines,
        per_machine=per_machine,
        config=config,
        recipe=recipe,
        devices=devices,
        endpoint=place,
        nameless="" if own_address() else platform.node(),
    )


def commands(facts: Facts, options: argparse.Namespace, own: Sequence[str]) -> dict[str, str]:
    """Return the command for each machine, or the input of an engine that starts all of them."""
    machines, per_machine, engine = facts.machines, facts.per_machine, options.engine
    if engine in ("kubernetes", "skypilot"):
        return {f"for {engine}": _filled(engine, machines, per_machine, own)}
    if engine == "slurm":
        line = f"sbatch --nodes {machines} --gpus-per-node {per_machine} launch/slurm.sbatch"
        return {"for slurm": f"{line} {shlex.join(own)}".rstrip()}
    if engine == "ssh":
        hosts = " ".join([FIRST, *(f"MACHINE_{rank}" for rank in range(1, machines))])
        start = f'HOSTS="{hosts}" NPROC_PER_NODE={per_machine} bash launch/multi_machine.sh'
        return {"for ssh": f"{start} {shlex.join(own)}".rstrip()}
    if engine != "torchrun" and facts.config.path:
        named = f"--config_file {facts.config.path} " if facts.config.chosen else ""
        each = machines > 1 and not facts.config.by_mpi
        ranks = [f"--machine_rank {rank} " for rank in range(machines)] if each else [""]
        starts = [f"accelerate launch {named}{rank}" for rank in ranks]
    elif engine == "torchrun" or machines > 1:
        meeting = f"--master_addr {FIRST} --master_port {PORT} --nproc_per_node {per_machine}"
        starts = [
            f"torchrun --nnodes {machines} --node_rank {r} {meeting} " for r in range(machines)
        ]
        if machines == 1:
            starts = [f"torchrun --standalone --nproc_per_node {per_machine} "]
    else:
        flags = f"--multi_gpu --num_processes {per_machine} " if per_machine > 1 else ""
        starts = [f"accelerate launch {flags}"]
    train = shlex.join(["-m", "cifar_dist.train", *own])
    return {f"on machine {rank}": start + train for rank, start in enumerate(starts)}


def _seconds(
    prediction: Prediction, recipe: Recipe, options: argparse.Namespace
) -> dict[str, float | str]:
    """Predict the time of a step from measurements; without them, report which are missing."""
    several = prediction.processes > 1
    if not options.like or (several and not options.link):
        missing = "--like RUN" + (" and --link JSON" if several else "")
        return {"seconds_per_step": f"unknown; measure first and give {missing}"}
    computation = recipe.train.batch_size / prediction.processes / read_rate(options.like)
    link = read_link(options.link) if several else (0.0, 1.0)
    seconds = step_seconds(
        computation, prediction.collectives, prediction.sent, prediction.processes, link
    )
    return {"seconds_per_step": seconds, "hours_of_training": seconds * prediction.steps / 3600}


def _numbers(prediction: Prediction, recipe: Recipe) -> dict[str, Any]:
    """Return a prediction as plain values, under the names of run.json."""
    values = dict(vars(prediction))
    dataset = values.pop("dataset")
    return {
        "world_size": values.pop("processes"),
        "train_images": len(dataset.train),
        "evaluation_images": {name: len(part) for name, part in dataset.evaluation.items()},
        "per_process": recipe.train.batch_size // recipe.train.accumulate // prediction.processes,
        **values,
    }


def _describe(prediction: Prediction, recipe: Recipe) -> dict[str, str]:
    """Return a prediction as lines of text."""
    train, dataset = recipe.train, prediction.dataset
    parts = f" in {train.accumulate} micro-batches" if train.accumulate > 1 else ""
    each = train.batch_size // train.accumulate // prediction.processes
    measured = ", ".join(f"{len(part)} {name}" for name, part in dataset.evaluation.items())
    files = ", ".join(f"{name} {_mb(size)}" for name, size in prediction.checkpoint.items())
    lines = {
        "processes": str(prediction.processes),
        "batch": f"{train.batch_size}{parts}, {each} per process",
        "images": f"{len(dataset.train)} training, {measured}, {len(dataset.classes)} classes",
        "steps": f"{prediction.steps_per_epoch} per epoch ({prediction.left_over} images "
        f"dropped), {train.epochs} epochs, {prediction.steps} in total",
        "learning_rate": ", ".join(
            f"{rate:.4g} at step {step}" for step, rate in prediction.rates.items()
        ),
        "network": f"{recipe.model.name}, {prediction.parameters} parameters, "
        f"{prediction.multiplications / 1e6:.1f} million multiplications per image",
        "checkpoints": f"{len(prediction.saves)}, the last at step {prediction.saves[-1]}; "
        f"{files}; {_mb(prediction.disk)} on disk at most",
        "memory_per_process": ", ".join(
            f"{name} {_mb(size)}" for name, size in prediction.memory.items()
        )
        + ", plus the memory of torch itself",
    }
    if prediction.processes > 1:
        lines["communication"] = (
            f"{_mb(prediction.sent)} per step in {prediction.collectives} all-reduces"
        )
    return lines


def _filled(engine: str, machines: int, per_machine: int, own: Sequence[str]) -> str:
    """Return a template of launch/ with the world size and the recipe filled in."""
    require(
        TEMPLATES.is_dir(),
        f"the templates for {engine} are in the folder launch/ of the repository, which is not "
        "installed with the package; run plan in a checkout",
    )
    if engine == "kubernetes":
        content = yaml.safe_load(
            (TEMPLATES / "kubernetes/trainjob.yaml").read_text(encoding="utf-8")
        )
        trainer = content["spec"]["trainer"]
        trainer["numNodes"], trainer["numProcPerNode"] = machines, per_machine
        trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] = per_machine
        kept = trainer["args"][2 if "--config" in own else 0 :]  # its first two are --config RECIPE
        trainer["args"] = [*kept, *own]
    else:
        content = yaml.safe_load((TEMPLATES / "skypilot.yaml").read_text(encoding="utf-8"))
        content["num_nodes"] = machines
        kind = content["resources"]["accelerators"].partition(":")[0]
        content["resources"]["accelerators"] = f"{kind}:{per_machine}"
        own = list(own)
        if "--config" in own:
            place = own.index("--config")
            content["envs"]["RECIPE"] = own[place + 1]
            del own[place : place + 2]
        content["run"] = f"{content['run'].rstrip()} {shlex.join(own)}".rstrip() + "\n"
    return f"\n{yaml.dump(content, Dumper=_Readable, sort_keys=False)}"


class _Readable(yaml.SafeDumper):
    """Writes multi-line text as a YAML block."""


def _as_block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _as_block)


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
