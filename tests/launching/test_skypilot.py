"""launch/skypilot.yaml: SkyPilot's loader reads it, and its run block trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_dist.config import dump_recipe, parse_recipe
from tests.helpers import JOB, Integers, free_port, needs, tested
from tests.launching.nodes import run_on_nodes

FILE = Path(__file__).parents[2] / "launch" / "skypilot.yaml"

OWN_WARNINGS = pytest.mark.filterwarnings("ignore")  # SkyPilot's, not ours


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the package, with a temporary home folder and without telemetry."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    needs("sky")
    import sky

    return sky


def template() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


@OWN_WARNINGS
def test_skypilot_reads_every_field(sky: Any) -> None:
    task = sky.Task.from_yaml(str(FILE))
    written, read = template(), task.to_yaml_config()
    for key in ("name", "num_nodes", "workdir", "envs", "setup", "run"):
        assert read[key] == written[key], key
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.accelerators == {"L4": 1}
    recovery = written["resources"]["job_recovery"]
    assert resources.job_recovery == {"strategy": None, **recovery}
    assert read["file_mounts"]["/runs"].items() >= written["file_mounts"]["/runs"].items()


@OWN_WARNINGS
def test_skypilot_would_refuse_a_misspelt_field(sky: Any) -> None:
    with pytest.raises(ValueError, match="num_node"):
        sky.Task.from_yaml_config({**template(), "num_node": 2})


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(
    tmp_path: Path, alone: Callable[..., Integers]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(parse_recipe(JOB)[0]))
    run = template()["run"].replace("/runs", str(tmp_path)).replace("8008", str(free_port()))
    machines = [
        {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
            "NAME": "first",
            "RECIPE": str(recipe),
        }
        for rank in range(2)
    ]
    printed = run_on_nodes(["bash", "-c", run], machines)
    assert "2 processes" in printed
    assert tested(tmp_path / "first") == alone()
