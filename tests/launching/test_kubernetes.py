"""launch/kubernetes: validated by the API's models, and the command of the pods trains."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import JOB, Integers, free_port, needs, status_of, tested
from tests.launching.nodes import run_on_nodes

FOLDER = Path(__file__).parents[2] / "launch" / "kubernetes"


def documents() -> dict[str, dict[str, Any]]:
    files = [FOLDER / "runtime.yaml", FOLDER / "trainjob.yaml"]
    texts = "\n---\n".join(file.read_text() for file in files)
    return {document["kind"]: document for document in yaml.safe_load_all(texts)}


def understood(document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a document that the API knows; its models drop all others."""
    needs("kubeflow_trainer_api")
    from kubeflow_trainer_api import models

    name = {
        "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
        "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
        "TrainJob": "TrainerV1alpha1TrainJob",
    }[document["kind"]]
    return dict(getattr(models, name).from_dict(copy.deepcopy(document)).to_dict())


def pod_template() -> dict[str, Any]:
    (job,) = documents()["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    return dict(job["template"]["spec"]["template"]["spec"])


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "TrainingRuntime", "TrainJob"])
def test_the_api_knows_every_field(kind: str) -> None:
    document = documents()[kind]
    assert understood(document) == document


def test_a_misspelt_field_would_be_found() -> None:
    runtime, job = documents()["TrainingRuntime"], documents()["TrainJob"]
    runtime["spec"]["template"]["spec"]["failurePolicy"] = {"maxRestart": 10}
    assert understood(runtime) != runtime
    job["spec"]["trainer"]["resourcePerNode"] = job["spec"]["trainer"].pop("resourcesPerNode")
    assert understood(job) != job


def test_the_documents_fit_together() -> None:
    found = documents()
    reference, trainer = (found["TrainJob"]["spec"][key] for key in ("runtimeRef", "trainer"))
    runtime = found["TrainingRuntime"]
    assert reference == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert not any(variable["name"].startswith("PET_") for variable in trainer["env"])
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (container,) = pod_template()["containers"]
    assert container["name"] == "node"  # the container in which Trainer sets torchrun's variables
    volumes = {volume["name"]: volume for volume in pod_template()["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    claim = mounted["/runs"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pod_template()["terminationGracePeriodSeconds"] > 30


def pods() -> list[dict[str, str]]:
    """Return the variables that Kubeflow Trainer would set in each pod."""
    trainer, port = documents()["TrainJob"]["spec"]["trainer"], str(free_port())
    return [
        {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        for rank in range(trainer["numNodes"])
    ]


def command(runs: Path) -> list[str]:
    """Return the container's command with another recipe, and another folder for /runs."""
    trainer = documents()["TrainJob"]["spec"]["trainer"]
    words = [word.replace("/runs", str(runs)) for word in trainer["command"] + trainer["args"]]
    recipe = words.index("--config")
    words[recipe : recipe + 2] = JOB
    return words


@pytest.mark.slow
def test_two_pods_train_as_one_process_does(tmp_path: Path, alone: Callable[..., Integers]) -> None:
    assert "2 processes" in run_on_nodes(command(tmp_path), pods())
    assert tested(tmp_path / "cifar10") == alone()


@pytest.mark.slow
def test_an_evicted_pod_stops_both_and_together_they_continue(
    tmp_path: Path, alone: Callable[..., Integers]
) -> None:
    words = command(tmp_path)
    module = words.index("cifar_dist.train")
    evicted = [*words[:module], "tests.faults.inject", "launcher_is_stopped 6 1"]
    run_on_nodes([*evicted, *words[module + 1 :]], pods(), code=1)
    stopped = status_of(tmp_path / "cifar10")
    assert stopped["state"] == "preempted"
    assert 6 <= stopped["step"] < 20
    assert f"continues at step {stopped['step']}" in run_on_nodes(words, pods())
    assert tested(tmp_path / "cifar10") == alone()
