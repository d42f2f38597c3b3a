"""Each common launch problem, with made-up facts, and the message that reports it."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from cifar_dist.config import Recipe, TrainConfig
from cifar_dist.launching.accelerate_config import (
    IGNORED,
    SEVERAL,
    AccelerateConfig,
    known_keys,
    read_config,
)
from cifar_dist.launching.checks import Device, Endpoint, Facts, check, check_ranks
from cifar_dist.launching.findings import exit_code

ROOT = Path(__file__).parents[2]
T4 = Device(0, "Tesla T4", "GPU-1", 7.5, (550, 54, 15))
H100 = Device(0, "NVIDIA H100 80GB HBM3", "GPU-2", 9.0, (560, 35, 3))
RTX = Device(0, "NVIDIA GeForce RTX 4090", "GPU-3", 8.9, (535, 183, 1))
SBATCH = (
    (ROOT / "launch/slurm.sbatch").read_text() if (ROOT / "launch/slurm.sbatch").exists() else ""
)


def of(**values: Any) -> AccelerateConfig:
    """Return a configuration with these values, for two processes on this machine."""
    common = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2}
    return AccelerateConfig(Path("two.yaml"), True, common | values, "abc")


def at(host: str, port: int = 29500, **facts: Any) -> Endpoint:
    return Endpoint(host, port, **facts)


def script(text: str) -> Facts:
    return Facts(batch_script=("job.sbatch", text))


PROBLEMS: dict[str, tuple[int, Facts, str, str]] = {
    "started alone": (
        1,
        Facts(alone="accelerate launch was asked for several processes but started only this one"),
        "alone",
        "started only this one",
    ),
    "a kind that starts one": (
        1,
        Facts(config=of(distributed_type="NO", num_processes=4)),
        "alone",
        "asks for 4 processes, but with distributed_type NO accelerate launch silently starts one",
    ),
    "machines apart": (
        1,
        Facts(config=of(distributed_type=False, num_machines=2), machines=2),
        "alone",
        "names 2 machines, but with distributed_type NO each would silently train alone",
    ),
    "unreachable": (
        2,
        Facts(machines=2, rank=1, endpoint=at("10.0.0.1", error="timed out")),
        "unreachable",
        "machine 1 cannot reach 10.0.0.1:29500 (timed out); check the firewall",
    ),
    "not started yet": (
        2,
        Facts(machines=2, rank=1, endpoint=at("10.0.0.1", error="refused")),
        "nobody-listens",
        "10.0.0.1 answers, but nothing listens on port 29500 yet; start the first machine",
    ),
    "another machine's address": (
        2,
        Facts(machines=2, rank=0, endpoint=at("10.0.0.9", error="refused")),
        "not-this-machine",
        "10.0.0.9 is not an address of this machine, which has machine_rank 0",
    ),
    "no address": (
        2,
        Facts(machines=2, config=of(num_machines=2)),
        "no-address",
        "names 2 machines but no main_process_ip",
    ),
    "rank expanded too early": (
        3,
        script('srun bash -c "torchrun --node_rank $SLURM_PROCID -m cifar_dist.train"'),
        "rank-expanded",
        "the batch script expands it, and every machine becomes rank 0",
    ),
    "a file nobody named": (
        4,
        Facts(config=AccelerateConfig(Path("default_config.yaml"), False, {}, "abc")),
        "default-config",
        "every accelerate launch here uses default_config.yaml (abc)",
    ),
    "total or each": (
        5,
        Facts(config=of(num_processes=3, num_machines=2, main_process_ip="10.0.0.1"), machines=2),
        "total",
        "num_processes is the total: 3 over 2 machines would start 1 on each",
    ),
    "more processes than GPUs": (
        5,
        Facts(per_machine=4, devices=[H100, H100]),
        "too-few-devices",
        "4 processes per machine, but this one has 2 GPUs",
    ),
    "port held": (
        6,
        Facts(endpoint=at("127.0.0.1", is_here=True, holder="process 812 (python train.py)")),
        "port-taken",
        "port 29500 is in use by process 812 (python train.py); end that program",
    ),
    "port 0 on several": (
        6,
        Facts(machines=2, endpoint=at("10.0.0.1", 0, is_here=True)),
        "port-zero",
        "port 0 on 2 machines: each would choose its own port, and hang",
    ),
    "no warning ahead of the end": (
        9,
        script("#SBATCH --ntasks-per-node=1\nsrun torchrun -m cifar_dist.train"),
        "not-requeued",
        "job.sbatch lacks --signal before the time limit, or --requeue",
    ),
    "a signal to the shell": (
        9,
        script("#SBATCH --ntasks-per-node=1 --requeue\n#SBATCH --signal=B:USR1@60\nsrun torchrun"),
        "signal-to-the-shell",
        "--signal=B:USR1@60 reaches only the batch shell",
    ),
    "two ways to choose GPUs": (
        10,
        Facts(config=of(gpu_ids="0,1"), environment={"CUDA_VISIBLE_DEVICES": "4,5"}),
        "gpu-ids",
        "gpu_ids 0,1 of two.yaml uses nvidia-smi's numbers, and replaces CUDA_VISIBLE_DEVICES=4,5",
    ),
    "somebody else's GPUs": (
        10,
        Facts(config=of(gpu_ids="0,1"), environment={"SLURM_JOB_ID": "7"}),
        "gpu-ids",
        "under Slurm use gpu_ids: all",
    ),
    "an address that leads back": (
        11,
        Facts(machines=2, address="127.0.1.1", interface="eth0"),
        "loopback-address",
        "this machine's host name resolves to 127.0.1.1, which gloo would publish to the other "
        "machines; export GLOO_SOCKET_IFNAME=eth0",
    ),
    "meeting at oneself": (
        11,
        Facts(machines=2, endpoint=at("localhost", is_here=True)),
        "loopback-endpoint",
        "localhost is a loopback address: on each of 2 machines it is the machine itself",
    ),
    "bf16 on an old GPU": (
        12,
        Facts(recipe=Recipe(train=TrainConfig(precision="bf16")), devices=[T4]),
        "precision",
        "bf16 is emulated on Tesla T4 (compute capability 7.5); use fp16",
    ),
    "fp16 on a CPU": (
        12,
        Facts(
            config=of(distributed_type="NO", num_processes=1, mixed_precision="fp16", use_cpu=True)
        ),
        "precision",
        "fp16 on a CPU: Accelerate would train in fp32 and report fp16",
    ),
    "GPUs that hang": (
        13,
        Facts(per_machine=2, devices=[RTX, RTX]),
        "peer-to-peer",
        "several NVIDIA GeForce RTX 4090 with driver 535.183.1 may hang in the first all-reduce; "
        "update the driver to 550.40.07 or later, or export NCCL_P2P_DISABLE=1",
    ),
    "unknown keys": (
        14,
        Facts(config=of(fp17=True, fp16=True)),
        "unknown-key",
        "accelerate launch refuses two.yaml: unknown fp17;",
    ),
    "an old key": (
        14,
        Facts(config=of(fp16=True)),
        "old-key",
        "fp16 in two.yaml is an old key, which accelerate launch reads as mixed_precision",
    ),
    "compiled by an old key": (
        14,
        Facts(config=of(dynamo_backend="INDUCTOR")),
        "compiled",
        "two.yaml compiles every network with the dynamo backend inductor",
    ),
    "compiled by a section": (
        14,
        Facts(config=of(dynamo_config={"dynamo_backend": "eager"})),
        "compiled",
        "two.yaml compiles every network with the dynamo backend eager",
    ),
    "old fp16 on a CPU": (
        12,
        Facts(config=of(fp16=True, use_cpu=True)),
        "precision",
        "fp16 on a CPU: Accelerate would train in fp32 and report fp16",
    ),
    "unknown nested keys": (
        14,
        Facts(config=of(dynamo_config={"bogus": 1})),
        "unknown-key",
        "dynamo_config.bogus in two.yaml is not an option of accelerate launch",
    ),
    "ignored keys": (
        14,
        Facts(config=of(rdzv_backend="c10d")),
        "ignored-key",
        "rdzv_backend in two.yaml is ignored by accelerate launch; give it on the command line: "
        "--rdzv_backend c10d",
    ),
    "an unquoted no": (
        14,
        Facts(config=of(mixed_precision=False)),
        "wrong-type",
        "mixed_precision in two.yaml is the unquoted word no, which YAML reads as false; write "
        'mixed_precision: "no"',
    ),
    "a list of GPUs": (
        14,
        Facts(config=of(gpu_ids=[0, 1])),
        "wrong-type",
        "gpu_ids in two.yaml is [0, 1], but accelerate launch needs a string",
    ),
    "lower case": (
        14,
        Facts(config=of(distributed_type="multi_gpu")),
        "wrong-type",
        "distributed_type in two.yaml is multi_gpu; write MULTI_GPU",
    ),
    "sharding": (
        14,
        Facts(config=of(distributed_type="FSDP")),
        "sharded",
        "FSDP, of two.yaml, is for networks that do not fit on one GPU; these networks do; use "
        "MULTI_GPU",
    ),
    "sharding by another section": (
        14,
        Facts(config=of(parallelism_config={"parallelism_config_dp_shard_size": 2})),
        "sharded",
        "parallelism_config, of two.yaml, is for networks that do not fit on one GPU",
    ),
    "sharding by a variable": (
        14,
        Facts(sharded="FSDP"),
        "sharded",
        "FSDP is for networks that do not fit on one GPU; these networks do; use MULTI_GPU",
    ),
    "a kind that is no more": (
        14,
        Facts(config=of(distributed_type="TP")),
        "wrong-type",
        "distributed_type in two.yaml is TP, which cifar_dist does not support; write MULTI_GPU",
    ),
    "no threads": (
        15,
        Facts(environment={"OMP_NUM_THREADS": "0"}),
        "threads",
        "OMP_NUM_THREADS is '0'; give a number of threads of 1 or more, or unset it",
    ),
    "a name without an address": (
        11,
        Facts(nameless="nohost.invalid"),
        "unknown-host-name",
        "this machine's host name nohost.invalid does not resolve, and torchrun would hang on it",
    ),
    "one thread": (
        15,
        Facts(cores=16, per_machine=2, environment={"OMP_NUM_THREADS": "1"}),
        "threads",
        "OMP_NUM_THREADS is 1, but 16 cores for 2 processes are 8 each; unset it",
    ),
    "tasks for each GPU": (
        16,
        script("#SBATCH --ntasks-per-node=4\nsrun torchrun --nproc_per_node 4 -m cifar_dist.train"),
        "tasks",
        "job.sbatch starts 4 tasks on each node",
    ),
    "cores lost": (
        16,
        script("#SBATCH --cpus-per-task=8\n#SBATCH --ntasks-per-node=1\nsrun torchrun"),
        "cpus-per-task",
        "srun does not inherit --cpus-per-task, and gives each task one core",
    ),
    "nothing downloaded": (
        17,
        Facts(machines=2, dataset="cifar10 is not in 'data', and would be downloaded at the start"),
        "dataset",
        "with several machines, download it first",
    ),
    "a batch that does not divide": (
        18,
        Facts(per_machine=3),
        "batch",
        "64 does not divide among 3 processes or micro-batches; the nearest valid sizes: 63, 66",
    ),
    "restarts in place": (
        19,
        Facts(environment={"PET_MAX_RESTARTS": "3"}),
        "restarts",
        "PET_MAX_RESTARTS is 3: torchrun's restart in place leaves keys of the failed start",
    ),
    "Windows": (20, Facts(platform="win32"), "windows", "train in WSL2"),
    "several on MPS": (
        20,
        Facts(platform="darwin", per_machine=2),
        "mps",
        "MPS supports one process; 2 would train on the CPU",
    ),
    "no room": (
        9,
        Facts(free=10_000_000, needed=400_000_000),
        "disk",
        "checkpoints need 400 MB, but 10 MB are free",
    ),
    "a small container": (
        7,
        Facts(per_machine=2, devices=[H100, H100], shared_memory=64 << 20),
        "shared-memory",
        "/dev/shm has only 67 MB, and NCCL uses it between GPUs",
    ),
}


@pytest.mark.parametrize(("number", "facts", "code", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_problem_is_reported(number: int, facts: Facts, code: str, message: str) -> None:
    found = [finding for finding in check(facts) if finding.code == code]
    assert any(message in f"{finding.message}; {finding.fix}" for finding in found), check(facts)


@pytest.mark.parametrize(
    "key", ["num_processes", "num_machines", "machine_rank", "main_process_port"]
)
@pytest.mark.parametrize("value", ["2", True, 2.0])
def test_a_value_that_is_not_an_integer_is_found(key: str, value: object) -> None:
    found = check(Facts(config=of(**{key: value})))
    wrong = [finding for finding in found if finding.code == "wrong-type"]
    assert [finding.message for finding in wrong] == [f"{key} in two.yaml is {value!r}"]
    assert wrong[0].fix == "write an integer"
    assert exit_code(found) == 2


def test_a_valid_configuration_has_no_findings() -> None:
    good = of(main_process_port=0, gpu_ids="all", mixed_precision="no")
    assert check(Facts(config=good, per_machine=2, devices=[H100, H100], cores=16)) == []


def test_the_shipped_slurm_script_has_no_problem() -> None:
    assert check(script((ROOT / "launch/slurm.sbatch").read_text())) == []


def rank(host: str = "a", device: str = "", same: Any = None, **other: Any) -> dict[str, Any]:
    return {
        "host": host,
        "device": device,
        "same": same or {},
        "clock": 0.0,
        "sees_out": True,
    } | other


RANKS = {
    "the same GPU twice": (
        [rank(device="GPU-1"), rank(device="GPU-2"), rank(device="GPU-1")],
        "ranks 0, 2 use the same GPU GPU-1 on a",
    ),
    "another configuration": (
        [rank(same={"configuration": "x"}), rank("b", same={"configuration": "y"})],
        "configuration is y on rank 1 (b) and x on rank 0 (a)",
    ),
    "clocks": ([rank(), rank("b", clock=-90.0)], "the clock of rank 1 (b) is off by -90.0 s"),
    "folders": ([rank(), rank("b", sees_out=False)], "ranks 1 do not see rank 0's run folder"),
}


@pytest.mark.parametrize(("ranks", "message"), RANKS.values(), ids=RANKS)
def test_ranks_are_compared(ranks: list[dict[str, Any]], message: str) -> None:
    assert [finding.message for finding in check_ranks(ranks)] == [message]


def test_ranks_that_agree_have_no_findings() -> None:
    assert list(check_ranks([rank(device="GPU-1"), rank("b", device="GPU-1")])) == []


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "TP", "XLA"])
def test_a_refused_kind_is_not_also_reported_as_starting_one_process(kind: str) -> None:
    found = {finding.code for finding in check(Facts(config=of(distributed_type=kind)))}
    assert len(found) == 1
    assert "alone" not in found


def test_the_old_keys_are_those_that_accelerate_reads(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    for text, precision, compiler in (
        ("fp16: true", "fp16", ""),
        ("fp16: true\nmixed_precision: 'no'", "no", ""),
        ("fp16: false", "no", ""),
        ("dynamo_backend: 'NO'", "no", ""),
        ("dynamo_backend: INDUCTOR", "no", "inductor"),
        ("dynamo_config: {dynamo_backend: EAGER}", "no", "eager"),
    ):
        path.write_text(f"distributed_type: 'NO'\n{text}\n")
        mine, theirs = read_config(str(path)), load_config_from_file(str(path))
        assert (mine.precision, mine.compiler) == (precision, compiler)
        assert (theirs.mixed_precision or "no") == precision
        assert theirs.dynamo_config.get("dynamo_backend", "").lower() == compiler


def test_values_that_accelerate_misreads_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 010\nmain_process_port: 1:30\n")
    config = read_config(str(path))
    assert config.processes == 8  # as Accelerate does
    misread = [
        finding.message for finding in check(Facts(config=config)) if finding.code == "misread"
    ]
    assert misread == [
        f"{path}: num_processes is 010, and is read as 8",
        f"{path}: main_process_port is 1:30, and is read as 90",
    ]
    path.write_text("num_processes: 2\ndistributed_type: MULTI_GPU\nnum_processes: 4\n")
    twice = f"num_processes is given twice in {path}, lines 1 and 3, and the last one counts"
    assert read_config(str(path)).misread == (twice,)


def test_exit_codes() -> None:
    assert exit_code([]) == 0
    assert exit_code(check(Facts(cores=9, environment={"OMP_NUM_THREADS": "1"}))) == 1
    assert exit_code(check(Facts(platform="win32"))) == 2


def test_the_constants_match_the_installed_accelerate() -> None:
    assert set(known_keys()) == set(ClusterConfig.__dataclass_fields__)
    defaults = vars(launch_command_parser().parse_args(["script.py"]))
    always = {key for key in known_keys() if defaults.get(key) is not None}
    handled = {"use_cpu", "debug", "tpu_use_cluster", "tpu_use_sudo", "main_training_function"}
    assert always - handled == set(IGNORED)
    from accelerate.utils import DistributedType

    assert set(SEVERAL) <= set(DistributedType.__members__)
