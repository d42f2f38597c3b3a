"""Recipes: accepted and refused keys and values, and light imports."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cifar_dist.config import (
    CODE_KEYS,
    RECIPES,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    TrackConfig,
    differences,
    dump_recipe,
    flatten,
    from_dict,
    load_recipe,
    parse_recipe,
    recipe_names,
    to_dict,
)
from cifar_dist.data import DATASETS
from cifar_dist.data.cache import cache_folder
from cifar_dist.errors import UsageError
from cifar_dist.training.optim import OPTIMIZERS
from cifar_dist.training.schedule import SCHEDULES


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_opens_with_its_command_and_survives_a_round_trip(
    name: str, tmp_path: Path
) -> None:
    recipe, origin = parse_recipe(["--config", name])
    assert recipe.name == name
    assert origin == f"recipe {name}"
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(("# accelerate launch -m cifar_dist.train", "# bash launch/local.sh"))
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert parse_recipe([f"--config={tmp_path / 'copy.yaml'}"])[0] == recipe


def test_default_recipe_and_overrides() -> None:
    recipe, origin = parse_recipe(["--train.epochs", "3", "--augment.flip=none", "--out", "x"])
    assert (recipe.name, recipe.train.epochs, recipe.augment.flip) == ("cifar10", 3, "none")
    assert origin == "recipe cifar10 with 3 options"


@pytest.mark.parametrize(
    ("choices", "section"),
    [
        (DATASETS, DataConfig),
        (OPTIMIZERS, OptimConfig),
        (SCHEDULES, ScheduleConfig),
    ],
)
def test_names_in_the_recipe_types_are_those_implemented(choices: dict, section: type) -> None:
    assert set(get_args(get_type_hints(section)["name"])) == set(choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.epoch", "3"], "unknown option '--train.epoch'; did you mean --train.epochs?"),
        (["--lr", "3"], "unknown option '--lr'; did you mean --optim.lr?"),
        (["--every_steps", "3"], "did you mean --checkpoint.every_steps or --track.every_steps?"),
        (["--epoch", "3"], "did you mean --train.epochs?"),
        (["--zzz", "3"], "unknown option '--zzz'; --help lists the options"),
        (["--optim.name", "adam"], "is not one of sgd, adamw, muon; did you mean 'adamw'?"),
        (["--train.epochs"], "--train.epochs has no value; give a number such as 10 or 0.1"),
        (["--train.compile", "--out", "x"], "--train.compile has no value; give true or false"),
        (["--train.compile", "maybe"], "--train.compile: 'maybe' is not true or false"),
        (["--data.image_size", "3.5"], "'3.5' is not a whole number such as 10 or null"),
        (["--track.log_with", "wandb"], "'wandb' is not a list such as [] or [tensorboard]"),
        (["--config", "tutorail"], "did you mean 'tutorial'?"),
        (["tutorail"], "recipe 'tutorail' is neither a file nor a shipped recipe; did you mean"),
        (["--out", "x", "tutorial"], "unexpected argument 'tutorial'; the recipe comes first"),
        (["--config", "/nowhere/x.yaml"], "neither a file nor a shipped recipe"),
        (["--config"], "--config has no value"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--train.epochs", "0"], "train.epochs is 0; give 1 or more"),
        (["--train.batch_size", "63", "--train.accumulate", "2"], "valid sizes: 62, 64"),
        (["--data.val_fraction", "1"], "data.val_fraction is 1"),
        (["--optim.lr", "0"], "optim.lr"),
        (
            ["--config", "tutorial", "--optim.head_lr", "2"],
            "optim.bias_lr and optim.head_lr need optim.name muon, not sgd; start from",
        ),
        (["--config", "cifar10-94", "--model.name", "deep"], "for speednet, whose head divides"),
        (["--config", "quick", "--model.name", "deep"], "not for deep; start from another"),
        (["--optim.name", "muon", "--optim.bias_lr", "0"], "optim.bias_lr is 0"),
        (["--optim.nesterov", "true", "--optim.momentum", "0"], "needs optim.momentum"),
        (["--train.ema", "1"], "train.ema"),
        (
            ["--train.loss", "a.py:f", "--train.label_smoothing", "0.1"],
            "train.label_smoothing is 0.1, but train.loss replaces",
        ),
        (["--model.dropout", "1"], "model.dropout"),
        (["--augment.grayscale", "2"], "augment.grayscale"),
        (["stray"], "stray"),
        (["--train.epochs", "010"], "--train.epochs: '010' is not a number such as"),
        (["--train.timeout=1:30"], "--train.timeout: '1:30' is not a whole number such"),
        (["--model.options", "3"], "model.options"),
        (["--train.epochs", "null"], "--train.epochs: 'null' is not a number such"),
        (
            ["--train", "{timeout: 1:30}"],
            "unknown option '--train'; did you mean --train.epochs or",
        ),
        (
            ["--config", "smoke", "--config", "tutorial"],
            "two recipes are given, smoke and tutorial",
        ),
    ],
)
def test_invalid_options_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_recipe(arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 3}", "unknown key 'train.epoch'"),
        ("trian: {epochs: 3}", "unknown key 'trian.epochs'"),
        ("- a\n- b", "contains no keys"),
        ("train: {epochs: [", "not readable as YAML"),
        ("train: {epochs: x}", "epochs"),
        ("name: a\ntrain:\n  epochs: 3\ntrain:\n  seed: 1", "train is given twice in"),
        ("train:\n  epochs: 3\n\n  epochs: 4", "epochs is given twice in"),
        ("train: {epochs: 3}\ntrain.epochs: 4", "train.epochs is given twice in"),
        ("train:\n  precision: no", 'train.precision: write "no" in quotes in'),
        ("name: off", 'name: write "off" in quotes in'),
        ("out: 2024", 'out: write "2024" in quotes in'),
        ("track: {log_with: [tensorboard, no]}", 'track.log_with: write "no" in quotes in'),
        ("augment: {flip: off}", "'off' is not one of none, random, alternating"),
        ("track: {log_with: no}", "'no' is not a list such as [] or"),
        ("model: {dropout: no}", "'no' is not a number such as 10 or 0.1 or null"),
        ("train: {epochs: 010}", "'010' is not a"),
        ("train: {epochs: '010'}", "'010' is not a"),
        ("train: {timeout: 1:30}", "'1:30' is not a"),
        ("train: {timeout: '1:30'}", "'1:30' is not a"),
        ("train: {epochs: 1:30.5}", "'1:30.5' is not a"),
        ("train: {seed: 0b11}", "'0b11' is not a"),
        ("model: {options: 3}", "'3' is not options by name, such as"),
        ("model: {options: {width: 1}, options: {}}", "options is given twice in"),
        ("model: {widths: [1], options: {widths: [2]}}", "model.options.widths is given twice in"),
        ("train: {epochs: 2026-11-29}", "'2026-11-29' is not a"),
        ("train: {epochs: =}", "'=' is not a"),
        ("train: {epochs: !!python/name:os.system }", "tag:yaml.org,2002:python/name:os.system"),
        ("train: {epochs: !!float x}", "has the tag tag:yaml.org,2002:float"),
        (f"train: {{seed: {'9' * 5000}}}", "not readable as YAML: Exceeds the limit"),
        ("train:\n  epochs:", "train.epochs has no value in"),
        ("train: 5", "train is a section, but has a value in"),
        ("train: {<<: {epochs: 3}}", "unknown key 'train.<<'"),
        ("train: {epochs: {a: 3}}", "train.epochs is not a single value in"),
        ("track: {log_with: &a [*a]}", "track.log_with is not a single value in"),
        ("optim: {lr: 1e999}", "optim.lr is inf"),
        ("optim: {weight_decay: .inf}", "optim.weight_decay is inf"),
        ("train:\n\tepochs: 3", "cannot start any token"),
        ("name: a\n---\nname: b", "expected a single document"),
        ("[" * 1500, "not readable as YAML"),
        (b"name: caf\xe9", "not readable as YAML"),
        (b"\x00\x01", "not readable as YAML"),
        ("", "contains no keys"),
    ],
)
def test_invalid_recipe_files_are_refused_in_one_line(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        parse_recipe(["--config", str(tmp_path / "r.yaml")])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.fault(55)
def test_duplicate_keys_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: mine\ntrain: {epochs: 3}\noptim: {lr: 0.05}\ntrain: {seed: 1}\n")
    with pytest.raises(UsageError) as refused:
        parse_recipe(["--config", str(path)])
    assert str(refused.value) == f"train is given twice in {path}, lines 2 and 4"


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("augment:\n#  flip: random\ntrain:\n  epochs: 2", {"train.epochs": 2}),
        ("out:\nmodel: {dropout: ~}", {"out": None, "model.dropout": None}),
        ("optim: {lr: 1e-3, momentum: .5, nesterov: yes}", {"optim.lr": 0.001}),
        ("optim: {lr: +5., momentum: 0.9, nesterov: off}", {"optim.nesterov": False}),
        ("train: {batch_size: 1_000, seed: 0xC0FFEE}", {"train.seed": 12648430}),
        ("train: {epochs: '3'}\ncheckpoint.keep: 4", {"train.epochs": 3, "checkpoint.keep": 4}),
        ("train: {epochs: &n 8, seed: *n}", {"train.epochs": 8, "train.seed": 8}),
        ("name: 2026-11-29\nout: 010", {"name": "2026-11-29", "out": "010"}),
        ("train: {precision: 'no'}\nname: !!str no", {"train.precision": "no", "name": "no"}),
        ("\ufeffname: =\nout: 1:30", {"name": "=", "out": "1:30"}),
    ],
)
def test_yaml_values_are_read_as_written(
    text: str, values: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    found = flatten(parse_recipe(["--config", str(tmp_path / "r.yaml")])[0])
    assert {key: found[key] for key in values} == values


def test_any_string_survives_a_round_trip(tmp_path: Path) -> None:
    words = ["no", "1e3", "-.5E-1", "010", "1:30", "~", "", "null", "0x1f", "2026-11-29", "=", "<<"]
    words += [".inf", "1_000", "*a", "&a", "- a", "a: b", "#a", "\ta", "caf\u00e9", "\udcff", "'\""]
    for text in words:
        recipe = Recipe(name=text, data=DataConfig(root=text, cache=text))
        (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(tmp_path / "copy.yaml") == recipe
    recipe = Recipe(name="1e3", track=TrackConfig(log_with=words))
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert parse_recipe(["--config", str(tmp_path / "copy.yaml")])[0] == recipe


def test_a_folder_or_a_pipe_is_refused_as_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UsageError, match="is neither a file nor a shipped recipe"):
            parse_recipe(["--config", str(tmp_path / name)])


def test_keys_that_may_differ_in_a_resumed_run() -> None:
    recipe = parse_recipe(["--config", "smoke"])[0]

    def changed(*arguments: str) -> list[str]:
        return differences(recipe, parse_recipe(["--config", "smoke", *arguments])[0])

    free = ["--out", "x", "--track.log_with", "[]", "--checkpoint.keep", "9", "--data.root", "y"]
    assert changed(*free, "--train.accumulate", "2", "--train.epochs", "9") == []
    assert changed("--train.epochs", "1") == ["train.epochs is 4 there and 1 here"]
    assert changed("--optim.lr", "1") == ["optim.lr is 0.003 there and 1.0 here"]


def test_no_other_key_may_differ_in_a_resumed_run() -> None:
    """Only paths, records and micro-batches may differ; all other keys change the result."""
    free = {"name", "out", "resume", "data.root", "data.cache", "train.accumulate", "train.timeout"}
    free |= {"checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.keep"}
    free |= {"track.log_with", "track.every_steps"}
    ignored = set()
    for key in flatten(Recipe()):
        if key in CODE_KEYS:
            continue
        changed = copy.deepcopy(Recipe())
        section, _, name = key.rpartition(".")
        object.__setattr__(getattr(changed, section) if section else changed, name, -1)
        if not differences(Recipe(), changed):
            ignored.add(key)
    assert ignored == free


def test_a_resumed_run_needs_the_same_network_in_any_folder() -> None:
    def named(name: str, **options: int) -> Recipe:
        return Recipe(model=ModelConfig(name=name, options=options))

    assert differences(named("a/net.py:Net"), named("/b/net.py:Net")) == []
    assert differences(named("net.py:Net"), named("net.py:Other"))
    assert differences(named("net.py:Net"), named("net.py:Net", width=3)) == [
        "model.options.width is None there and 3 here"
    ]
    assert differences(named("net.py:Net", width=3), named("net.py:Net"))


def test_keys_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("model: {name: speednet, widths: [8, 16], depth: ~}")
    old, _ = parse_recipe(["--config", str(tmp_path / "old.yaml"), "--model.stride", "2"])
    assert old.model.options == {"widths": [8, 16], "stride": 2}
    held = to_dict(Recipe())
    held["model"] = {"name": "speednet", "widths": None, "depth": 3, "stride": None}
    assert from_dict(held).model.options == {"depth": 3}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--model.options.width", "64"], {"width": 64}),
        (["--model.options.width=64", "--model.options.deep", "true"], {"width": 64, "deep": True}),
        (["--model.options", "{width: 64, name: x}"], {"width": 64, "name": "x"}),
        (
            ["--config", "quick", "--model.depth", "2"],
            {"widths": [32, 64, 64], "depth": 2, "stride": 2},
        ),
    ],
)
def test_options_of_the_network(
    arguments: list[str], options: dict[str, object], tmp_path: Path
) -> None:
    assert parse_recipe(arguments)[0].model.options == options
    (tmp_path / "recipe.yaml").write_text(dump_recipe(parse_recipe(arguments)[0]))
    assert load_recipe(tmp_path / "recipe.yaml").model.options == options


def test_any_run_has_at_least_20_records_of_the_training_loss() -> None:
    assert [TrackConfig().interval(steps) for steps in (5, 20, 100, 5000)] == [1, 1, 5, 50]
    assert TrackConfig(every_steps=7).interval(5000) == 7


def test_the_set_of_options_is_deliberate() -> None:
    """A new option needs a reason: who sets it, and why a constant does not suffice."""
    sections = {key.partition(".")[0] for key in flatten(Recipe())}
    counts = {s: sum(key.startswith(f"{s}.") for key in flatten(Recipe())) for s in sections}
    assert counts == {
        **{"name": 0, "out": 0, "resume": 0, "data": 10, "augment": 5, "model": 3, "optim": 7},
        **{"schedule": 5, "train": 17, "checkpoint": 3, "track": 2},
    }


def test_reading_options_imports_neither_torch_nor_torchvision() -> None:
    code = (
        "import sys; from cifar_dist.train import main; import cifar_dist.processes.start; "
        "assert main(['--train.epoch', '1']) == 2; "
        "assert not {'torch', 'torchvision', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ("error: unknown option '--train.epoch'; did you mean --train.epochs?\n")


def test_cache_folder_follows_the_recipe_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder(DataConfig())) == "/somewhere/cifar-dist"
    assert str(cache_folder(DataConfig(cache="/else"))) == "/else"
