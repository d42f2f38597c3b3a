"""The commands evaluate and predict."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist import evaluate, files, predict
from cifar_dist.config import DataConfig, ModelConfig
from cifar_dist.data import load_dataset
from cifar_dist.data.synthetic import draw
from cifar_dist.errors import UsageError
from cifar_dist.evaluate import evaluate_checkpoint
from cifar_dist.models.catalogue import build_network
from cifar_dist.storage.checkpoint import find_checkpoint, find_weights, save_checkpoint
from cifar_dist.storage.weights import load_weights, restore_network
from cifar_dist.training.run import Result
from tests.helpers import command, obeying_modes, read_lines, run_command, write_folder


def measure(trained: Result, capfd: pytest.CaptureFixture[str], *options: str) -> dict:
    capfd.readouterr()
    assert evaluate.main(["--checkpoint", str(trained.out), "--json", *options]) == 0
    return dict(json.loads(capfd.readouterr().out))


def test_evaluate_gives_the_counts_of_the_run(
    trained: Result, capfd: pytest.CaptureFixture[str]
) -> None:
    last = read_lines(trained.out)[-1]
    result = measure(trained, capfd)
    assert (result["split"], result["step"]) == ("test", last["step"])
    assert (result["correct"], result["count"]) == (last["correct"], last["count"])
    assert result["loss"] == last["loss"]
    assert np.trace(result["confusion"]) == result["correct"]
    assert list(result["per_class"]) == list(draw(1, 8, (0,)).classes)
    shares = list(result["per_class"].values())
    assert np.mean(shares) == pytest.approx(result["accuracy"])  # classes have equal sizes
    val = next(line for line in reversed(read_lines(trained.out)) if line["split"] == "val")
    held_out = measure(trained, capfd, "--split", "val")
    assert (held_out["correct"], held_out["count"]) == (val["correct"], val["count"])
    assert measure(trained, capfd, "--split", "train")["count"] == 1600


def test_the_calibration_error_is_that_of_the_saved_weights(
    trained: Result, capfd: pytest.CaptureFixture[str]
) -> None:
    path, (progress, weights) = find_weights(str(trained.out))
    images = load_dataset(progress.recipe.data).evaluation["test"]
    mean, std = torch.tensor(progress.mean), torch.tensor(progress.std)
    pixels = (torch.from_numpy(images.images[images.selected]) / 255 - mean) / std
    network = restore_network(progress, weights, path)
    with torch.no_grad():
        shares = network(pixels.permute(0, 3, 1, 2)).softmax(1)
    confidence, predicted = shares.double().max(1)
    right = predicted == torch.from_numpy(images.labels[images.selected])
    bins = [confidence.mul(15).floor() == number for number in range(15)]
    gaps = [(right[chosen].double() - confidence[chosen]).sum().abs() for chosen in bins]
    found = measure(trained, capfd)
    assert found["calibration_error"] == pytest.approx(float(sum(gaps)) / 100, rel=1e-4)
    assert found["calibration_error"] > 0.01


def test_best_step_and_views(trained: Result, capfd: pytest.CaptureFixture[str]) -> None:
    assert trained.best is not None
    best = measure(trained, capfd, "--best")
    assert (best["step"], best["correct"]) == (
        trained.best["test"]["step"],
        trained.best["test"]["correct"],
    )
    views = measure(trained, capfd, "--tta", "flip_shift")
    assert views["tta"] == "flip_shift"
    assert views["loss"] != measure(trained, capfd)["loss"]


def test_only_the_weights_of_a_checkpoint_are_read_and_only_once(
    trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained.out, tmp_path / "run")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    hashed: list[str] = []
    original = files.sha256_of

    def sha256_of(file: Any) -> str:
        hashed.append(Path(file.name).name)
        return original(file)

    monkeypatch.setattr(files, "sha256_of", sha256_of)
    for path in run.glob("checkpoints/*/optim.safetensors"):
        path.chmod(0)
    network = build_network(ModelConfig(name="tutorial-relu", dropout=0), 10)
    with obeying_modes():
        for use in (
            lambda: evaluate.main(["--checkpoint", str(run), "--best"]),
            lambda: predict.main(["--checkpoint", str(run), "--best", str(tmp_path / "image.png")]),
            lambda: load_weights(network, str(run)),
        ):
            hashed.clear()
            assert use() == 0
            assert hashed.count("model.safetensors") == 1
            assert set(hashed) == {"model.safetensors", "state.json"}


@pytest.mark.parametrize("options", [[], ["--best"]])
def test_a_damaged_checkpoint_is_warned_of_once(
    trained: Result, options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained.out, tmp_path / "run"))
    path, _ = find_checkpoint(str(run))
    again = shutil.copytree(path, path.with_name("step-99999999"))
    (again / "state.json").write_text("{}")
    capfd.readouterr()
    assert evaluate.main(["--checkpoint", str(run), *options]) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: damaged checkpoint step-99999999: the size of state.json differs; "
        f"using {path.name}"
    ]


def test_the_table_names_every_class(trained: Result, capfd: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--checkpoint", str(trained.out)]) == 0
    output = capfd.readouterr().out
    last = read_lines(trained.out)[-1]
    assert f"({last['correct']}/{last['count']})" in output
    for name in draw(1, 8, (0,)).classes:
        assert f"\n{name} " in output


def test_two_processes_give_the_counts_of_the_run(trained: Result) -> None:
    start = command(2, module="cifar_dist.evaluate")
    done = run_command([*start, "--checkpoint", str(trained.out), "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    last = read_lines(trained.out)[-1]
    assert (result["correct"], result["count"]) == (last["correct"], last["count"])


def test_another_folder_with_the_same_classes(
    trained: Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"test": 50}, classes=10)
    options = ["--data.name", "imagefolder", "--data.root", str(root)]
    assert measure(trained, capfd, *options)["count"] == 50
    assert measure(trained, capfd, *options[:3], str(root / "test"))["count"] == 50


def test_a_missing_class_is_refused_by_name(
    trained: Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"test": 45}, classes=9)
    options = ["--data.name", "imagefolder", "--data.root", str(root)]
    assert evaluate.main(["--checkpoint", str(trained.out), *options]) == 2
    error = capfd.readouterr().err
    assert error == ("error: the dataset's classes are not the checkpoint's; missing: four dots\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "/absent"], "neither a run folder nor a checkpoint"),
        (["--chekpoint", "x"], "did you mean '--checkpoint'?"),
        ([], "name one run: cifar-dist evaluate RUN"),
        (["x", "--checkpoint", "x"], "name one run: cifar-dist evaluate RUN"),
        (["x", "--data.image_size", "64"], "--data.image_size is fixed by the checkpoint"),
        (["x", "--data.nam", "cifar10"], "did you mean --data.name?"),
        (["x", "--train.epochs", "3"], "unexpected argument '--train.epochs'"),
        (
            ["x", "--split", "testing"],
            "--split: 'testing' is not one of test, val, train; did you mean 'test'?",
        ),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(options) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_weights_of_another_architecture_are_refused(trained: Result, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(trained.out))[1]
    recipe = replace(checkpoint.progress.recipe, model=ModelConfig(name="deep"))
    other = replace(checkpoint, progress=replace(checkpoint.progress, recipe=recipe))
    path = save_checkpoint(tmp_path, 1, other)
    with pytest.raises(UsageError, match="do not fit the model deep"):
        evaluate_checkpoint(str(path))
    shutil.rmtree(path)


def test_predict_names_images_of_any_kind(
    trained: Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = Image.fromarray(draw(10, 32, seed=(11,)).images[3])
    alpha = shape.resize((64, 64)).convert("RGBA")
    alpha.putalpha(Image.new("L", (64, 64), 200))
    alpha.save(tmp_path / "alpha.png")
    shape.convert("L").save(tmp_path / "grey.jpg")
    shape.convert("CMYK").save(tmp_path / "cmyk.jpg")
    capfd.readouterr()
    files = [str(tmp_path / name) for name in ("alpha.png", "cmyk.jpg", "grey.jpg")]
    options = ["--checkpoint", str(trained.out)]
    assert predict.main([*options, "--json", "--top", "10", *files]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == files
    for row in rows:
        probabilities = [entry["probability"] for entry in row["classes"]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
        assert {entry["class"] for entry in row["classes"]} == set(draw(1, 8, (0,)).classes)
    assert predict.main([*options, str(tmp_path)]) == 0
    table = capfd.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in table] == files
    assert table[0].count(",") == 2


def test_predict_agrees_with_evaluate(trained: Result, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"test": 60}, classes=10)
    measured = evaluate_checkpoint(str(trained.out), DataConfig(name="imagefolder", root=str(root)))
    predictions = predict.predict(str(trained.out), [root], top=1)
    right = sum(
        Path(prediction["image"]).parent.name == prediction["classes"][0]["class"]
        for prediction in predictions
    )
    assert (right, len(predictions)) == (measured["correct"], measured["count"])


def test_predict_refuses_files_that_are_not_images(
    trained: Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("x.png", "x.png' is not an image that can be read"),
        ("absent.png", "does not exist"),
        ("empty", "holds no image file"),
    ]:
        options = ["--checkpoint", str(trained.out), "--bad-images", "stop"]
        assert predict.main([*options, str(tmp_path / name)]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.fault(65)
def test_predict_goes_on_after_a_bad_image(
    trained: Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"test": 60}, classes=10)
    files = sorted(root.rglob("*.png"))
    for file in files[3], files[40]:
        file.write_bytes(file.read_bytes()[:60])
    os.mkfifo(tmp_path / "fifo.png")
    capfd.readouterr()
    options = ["--checkpoint", str(trained.out), "--json", str(tmp_path / "fifo.png"), str(root)]
    assert predict.main(options) == 1
    output, errors = capfd.readouterr()
    named = [json.loads(line)["image"] for line in output.splitlines()]
    assert named == [str(file) for file in files if file not in (files[3], files[40])]
    bad = [str(tmp_path / "fifo.png"), str(files[3]), str(files[40])]
    assert [line.split("'")[1] for line in errors.splitlines()] == bad
    assert all(line.startswith("error: ") for line in errors.splitlines())
    assert predict.main([*options, "--bad-images", "stop"]) == 2
    output, errors = capfd.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert predict.main([*options, str(tmp_path / "absent.png")]) == 2
    output, errors = capfd.readouterr()
    assert (output, errors.count("\n")) == ("", 1)


def test_predictions_are_yielded_after_each_batch(
    trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "set", {"test": 60}, classes=10)
    monkeypatch.setattr(predict, "BATCH", 8)
    results = predict.stream_predictions(str(trained.out), [root])
    first = next(results)
    files = sorted(root.rglob("*.png"))
    for file in files[8:]:  # none of them has been opened
        file.unlink()
    others = list(results)
    assert ["classes" in result for result in (first, *others)] == [True] * 8 + [False] * 52
    assert [result["image"] for result in (first, *others)] == list(map(str, files))
