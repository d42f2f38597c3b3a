"""The predictions of plan, compared with the records of real runs."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cifar_dist.config import parse_recipe
from cifar_dist.errors import UsageError
from cifar_dist.launching import plan
from cifar_dist.launching.forecast import Prediction, fit_line, predict, step_seconds
from cifar_dist.models.catalogue import MODELS
from cifar_dist.models.tutorial import tutorial
from cifar_dist.storage.checkpoint import prune
from cifar_dist.train import run
from cifar_dist.training.optim import OPTIMIZERS
from tests.helpers import TINY, command, read_lines, run_command, write_folder
from tests.launching.test_kubernetes import understood


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Return the JSON output of plan."""
    plan.main([*argv, "--json"])
    return dict(json.loads(capsys.readouterr().out))


MANY = ["--checkpoint.keep", "100"]
HEADER = 10_000  # bytes: limit for the names and shapes in a safetensors file
RUNS = {
    "one process": (1, []),
    "momentum and averaged weights on two": (
        2,
        ["--optim.momentum", "0.9", "--train.ema", "0.9", "--train.accumulate", "2"],
    ),
    "adamw and BatchNorm on two": (
        2,
        [
            *("--model.name", "deep", "--optim.name", "adamw", "--optim.lr", "0.001"),
            *("--schedule.name", "one_cycle", "--train.epochs", "1", "--data.limit_train", "100"),
        ],
    ),
    "muon, a validation share and steps": (
        1,
        [
            *("--model.name", "speednet", "--model.widths", "[8, 16]", "--optim.name", "muon"),
            *("--schedule.name", "cosine", "--schedule.warmup_epochs", "0.5"),
            *("--checkpoint.every_steps", "7", "--checkpoint.every_epochs", "2"),
            *("--data.val_fraction", "0.1", "--train.epochs", "2.5"),
        ],
    ),
}

CASES = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] * (not name.startswith("muon")))
    for name, case in RUNS.items()
]


@pytest.mark.parametrize(("processes", "options"), CASES)
def test_a_plan_equals_the_records_of_a_run(
    processes: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TINY, *MANY, *options, "--out", str(tmp_path / "run")]
    expected = planned(capsys, *argv, "--processes-per-machine", str(processes))
    done = run_command([*command(processes), *argv])
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/run.json").read_text())
    for key in ("world_size", "train_images", "evaluation_images", "steps_per_epoch"):
        assert expected[key] == facts[key], key
    lines = [line for line in read_lines(tmp_path / "run") if line["split"] == "train_window"]
    assert expected["steps"] == lines[-1]["step"] == len(lines)
    rates = {str(line["step"]): line["learning_rate"] for line in lines}
    assert expected["rates"] == {step: rates[step] for step in expected["rates"]}
    assert f"batch {parse_recipe(argv)[0].train.batch_size}" in done.stdout
    assert f"{expected['per_process']} per process" in done.stdout
    assert f"({expected['left_over']} images dropped)" in done.stdout
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    steps = [int(path.name.removeprefix("step-")) for path in saved]
    best = json.loads((saved[-1] / "state.json").read_text())["best"]["step"]
    # With a validation split, every new best epoch is saved too.
    ends = set(range(0, expected["steps"] + 1, expected["steps_per_epoch"])) if best else set()
    assert set(steps) - ends == set(expected["saves"]) - ends
    assert set(expected["saves"]) <= set(steps)
    for path in saved:
        files = json.loads((path / "MANIFEST.json").read_text())["files"]
        sizes = {name: entry["size"] for name, entry in files.items() if "tensors" in name}
        assert sizes.keys() == expected["checkpoint"].keys()
        for name, size in expected["checkpoint"].items():
            assert 0 < sizes[name] - size < HEADER, name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["tutorial", "resnet18"])
def test_a_step_sends_the_planned_bytes(network: str, tmp_path: Path) -> None:
    options = [*TINY, "--model.name", network, "--data.limit_train", "128"]
    worker = [*command(2, module="tests.worker"), "count_bytes", str(tmp_path / "sent.json")]
    done = run_command([*worker, *options, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    sent = json.loads((tmp_path / "sent.json").read_text())
    expected = predict(parse_recipe(options)[0], 2)
    settled = sent[1:]  # DDP rebuilds its buckets in the second step
    assert settled == [[expected.collectives, expected.sent]] * len(settled)
    assert len(settled) > 1


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("per_machine", [1, 2, 8])
def test_plans_for_gpus(
    machines: int, per_machine: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(
        capsys,
        *("--config", "resnet18", "--train.batch_size", "128"),
        *("--machines", str(machines), "--processes-per-machine", str(per_machine)),
    )
    world = machines * per_machine
    assert found["world_size"] == world
    assert found["per_process"] == 128 // world
    assert found["steps_per_epoch"] == 390
    assert found["left_over"] == 80
    weights = 11_173_962
    assert found["parameters"] == weights
    assert (found["collectives"], found["sent"]) == ((4, 4 * weights + 4) if world > 1 else (0, 0))
    lines = [value for key, value in found.items() if key.startswith("on machine")]
    assert len(lines) == machines
    for rank, line in enumerate(lines):
        if machines > 1:
            assert f"--nnodes 2 --node_rank {rank}" in line
        if world > 1:
            assert (
                f"{'--nproc_per_node' if machines > 1 else '--num_processes'} {per_machine}" in line
            )
        assert line.endswith("-m cifar_dist.train --config resnet18 --train.batch_size 128")


@pytest.mark.slow
def test_the_planned_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [*TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")]
    line = planned(capsys, *own, "--processes-per-machine", "2")["on machine 0"]
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", f"{bin_folder}/{line}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_plan_takes_little_more_than_the_import_of_torch() -> None:
    def cpu_seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert subprocess.run([sys.executable, *arguments], capture_output=True).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    plan = cpu_seconds("-m", "cifar_dist.launching.plan", "--config", "resnet18")
    assert plan < 2.5 * cpu_seconds("-c", "import torch")  # 1.3 times


def test_every_optimizer_is_planned() -> None:
    state = {
        name: predict(parse_recipe([*TINY, "--optim.name", name])[0], 1).memory["optimizer"]
        for name in OPTIMIZERS
    }
    weights = 4 * 145_578
    assert state["sgd"] == 0
    assert state["muon"] == weights
    assert state["adamw"] == 2 * weights + 4 * 10  # plus the step count of each tensor


def test_a_network_that_returns_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tutorial", lambda num_classes: tutorial(12))
    with pytest.raises(UsageError, match=r"tutorial returns 12 logits per .* has 10 classes"):
        predict(parse_recipe(TINY)[0], 1)


@pytest.mark.parametrize("held_out", ["0", "0.2"])
def test_checkpoints_take_the_planned_disk_space(
    held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, "--train.epochs", "6", "--checkpoint.keep", "2", "--optim.momentum", "0.9"]
    options += ["--checkpoint.every_steps", "5", "--data.val_fraction", held_out]
    # From the third epoch on the learning rate is 0, so that the best epoch is an early one.
    options += ["--schedule.name", "step", "--schedule.step_epochs", "2", "--schedule.gamma", "0"]
    taken = []

    def measured(folder: Path, keep: int, best: int | None) -> None:
        taken.append(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
        prune(folder, keep, best)

    monkeypatch.setattr("cifar_dist.training.session.prune", measured)
    recipe = parse_recipe([*options, "--out", str(tmp_path)])[0]
    run(recipe)
    files = 3 * (2 + 1 + (held_out != "0"))
    assert 0 < max(taken) - predict(recipe, 1).disk < files * HEADER


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (2, 2)])
def test_the_planned_memory_of_activations_is_kept_by_a_step(
    processes: int, accumulate: int
) -> None:
    recipe = parse_recipe([*TINY, "--train.accumulate", str(accumulate)])[0]
    network = MODELS[recipe.model.name](10)
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randn(32 // processes // accumulate, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    really_kept = sum(size for place, size in kept.items() if place not in parameters)
    planned = predict(recipe, processes).memory["activations"]
    assert planned == pytest.approx(really_kept, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_buckets_are_those_of_ddp(name: str) -> None:
    with torch.device("meta"):
        network = MODELS[name](10)
    # DDP fills its buckets in the order in which gradients arrive, last layer first.
    trained = [torch.empty(p.shape) for p in network.parameters() if p.requires_grad][::-1]
    limits = [1 << 20, 25 << 20]
    buckets, _ = torch.distributed._compute_bucket_assignment_by_size(trained, limits)
    planned = predict(parse_recipe([*TINY, "--model.name", name])[0], 2)
    assert planned.collectives == len(buckets) + 1  # and the all-reduce that agrees on stopping


def test_a_plan_follows_ema_precision_and_gradient_compression() -> None:
    def planned(*options: str) -> Prediction:
        return predict(parse_recipe([*TINY, *options])[0], 2)

    plain, flag = planned(), 4  # bytes of the all-reduce that agrees on stopping
    assert planned("--train.ema", "0.9").memory["weights"] == 2 * plain.memory["weights"]
    for precision in ("bf16", "fp16"):
        halved = planned("--train.precision", precision).memory
        assert halved["activations"] == plain.memory["activations"] // 2
        assert halved["weights"] == plain.memory["weights"] == 4 * 145_578
    sent = planned("--train.compress_gradients", "true").sent
    assert (plain.sent, sent) == (4 * 145_578 + flag, 2 * 145_578 + flag)


def test_latency_and_bandwidth_are_fitted_to_times_by_size() -> None:
    seconds = {size: 2e-4 + size / 5e8 for size in (1 << 10, 1 << 16, 1 << 20, 25 << 20)}
    constant, slope = fit_line(seconds)
    assert (constant, slope) == pytest.approx((2e-4, 1 / 5e8))


def test_the_accelerate_configuration_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.yaml"
    values = {"distributed_type": "MULTI_GPU", "num_machines": 2, "num_processes": 8}
    values |= {"main_process_ip": "10.1.1.1", "main_process_port": 0}
    path.write_text(yaml.safe_dump(values))
    found = planned(capsys, "--accelerate-config", str(path), "--config", "tutorial")
    assert found["world_size"] == 8
    assert f"accelerate launch --config_file {path} --machine_rank 1 -m" in found["on machine 1"]
    assert [finding["code"] for finding in found["findings"]] == ["port-zero", "no-out"]


def test_mpirun_starts_the_processes_of_all_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mpi.yaml"
    values: dict[str, Any] = {"distributed_type": "MULTI_CPU", "use_cpu": True}
    values |= {"num_machines": 2, "num_processes": 4, "mpirun_config": {"mpirun_hostfile": "hosts"}}
    values |= {"main_process_ip": "10.1.1.1", "main_process_port": 29500}
    path.write_text(yaml.safe_dump(values))
    found = planned(capsys, "--accelerate-config", str(path), "--config", "tutorial")
    assert found["world_size"] == 4
    assert f"accelerate launch --config_file {path} -m" in found["on machine 0"]
    assert "on machine 1" not in found


def test_a_folder_of_images_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "set", {"train": 30, "test": 9})
    options = ["--data.name", "imagefolder", "--data.root", str(root), "--train.batch_size", "8"]
    found = planned(capsys, *TINY[:2], *options, "--data.limit_train", "null")
    assert (found["train_images"], found["evaluation_images"]) == (30, {"test": 9})
    assert (found["steps_per_epoch"], found["left_over"]) == (3, 6)


def test_the_time_of_a_step_is_predicted_only_from_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", "tutorial", "--processes-per-machine", "2"]
    assert "give --like RUN and --link JSON" in planned(capsys, *argv)["seconds_per_step"]
    link = {"all_reduce": {"latency_seconds": 0.5, "bytes_per_second": 1e6}}
    (tmp_path / "link.json").write_text(json.dumps(link))
    line = {"split": "train_window", "epoch": 0, "step": 1}
    speeds = [{**line, "images_per_second": rate} for rate in (100.0, 64.0, 9.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, speeds)))
    (tmp_path / "run.json").write_text(json.dumps({"world_size": 2}))
    measured = ["--like", str(tmp_path), "--link", str(tmp_path / "link.json")]
    seconds = planned(capsys, *argv, *measured)["seconds_per_step"]
    # 32 images at 32 images/s, two all-reduces with a latency of 0.5 s, and 0.58 MB at 1 MB/s.
    assert seconds == pytest.approx(1 + 2 * 0.5 + 0.582316)
    assert math.isclose(step_seconds(1.0, 2, 1e6, 4, (0.1, 1e6)), 1 + 2 * 3 * 0.1 + 1.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "tutorial", "--machines", "0"], "--machines is 0; give 1 or more"),
        (["--device", "Abacus"], "--device Abacus is not known; name one of"),
        (["--engine", "oxcart"], "'oxcart' is not one of"),
        (["--machine", "2"], "unknown option '--machine'"),
        (["--like", "/nowhere"], "'/nowhere' is not a run folder with recorded speeds"),
        (["--accelerate-config", "/nowhere"], "'/nowhere' is not a file"),
        (["--config", "tutorial", "--data.limit_train", "9"], "exceeds the 9 training images"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_batch_size_that_does_not_divide_is_reported_with_valid_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan.main(["--config", "tutorial", "--processes-per-machine", "3"]) == 2
    assert "the nearest valid sizes: 63, 66 [batch]" in capsys.readouterr().out


def test_each_engine_gets_its_command_or_filled_template(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def filled(engine: str) -> str:
        size = ["--machines", "2", "--processes-per-machine", "4"]
        own = ["--config", "tutorial", "--optim.lr", "0.02"]
        return str(planned(capsys, *own, *size, "--engine", engine)[f"for {engine}"])

    recipe = "--config tutorial --optim.lr 0.02"
    assert filled("slurm") == f"sbatch --nodes 2 --gpus-per-node 4 launch/slurm.sbatch {recipe}"
    start = 'HOSTS="FIRST_MACHINE MACHINE_1" NPROC_PER_NODE=4 bash launch/multi_machine.sh'
    assert filled("ssh") == f"{start} {recipe}"
    job = yaml.safe_load(filled("kubernetes"))
    assert understood(job) == job
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 4
    words = parse_recipe(trainer["args"])[0]
    assert (words.name, words.optim.lr, words.out) == ("tutorial", 0.02, "/runs/cifar10")
    task = yaml.safe_load(filled("skypilot"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "L4:4")
    assert task["envs"]["RECIPE"] == "tutorial"
    assert task["run"].endswith(
        '--config "$RECIPE" --resume auto --out "/runs/$NAME" --optim.lr 0.02\n'
    )
    assert subprocess.run(["bash", "-n", "-c", task["run"]]).returncode == 0


def test_an_installation_without_templates_names_their_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "TEMPLATES", Path("/nowhere"))
    assert plan.main(["--config", "tutorial", "--engine", "kubernetes"]) == 2
    assert "are in the folder launch/ of the repository" in capsys.readouterr().err


def test_an_engine_gets_its_input_alone_on_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["--config", "tutorial", "--machines", "2", "--processes", "2", "--out", "/shared/run"]
    assert plan.main([*own, "--engine", "kubernetes"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["kind"] == "TrainJob"
    assert "steps: 781 per epoch" in printed.err
    assert "no problems found" in printed.err


def test_an_epoch_that_drops_many_images_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--config", "smoke", "--data.limit_train", "90", "--train.batch_size", "50"]
    (finding,) = planned(capsys, *few)["findings"]
    assert (finding["code"], finding["level"]) == ("dropped", "warning")
    assert "each epoch leaves out 40 of 90 training images" in finding["message"]
    assert not planned(capsys, "--config", "smoke")["findings"]
