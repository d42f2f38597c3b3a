"""Streams that are closed, full or cannot encode a text never cause an exception."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cifar_dist
from cifar_dist.training.run import Result
from tests.helpers import TINY, command, run_command, status_of, write_folder

PACKAGE = Path(cifar_dist.__file__).parent
CLOSED = ["<&- >&- 2>&-", *(pytest.param(s, marks=pytest.mark.slow) for s in (">&-", "2>&-"))]


def in_shell(words: str, redirections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(["bash", "-c", f"{sys.executable} -m {words} {redirections}"], **environment)


@pytest.mark.fault(67)
@pytest.mark.parametrize("redirections", CLOSED)
def test_a_run_with_closed_streams_finishes(redirections: str, tmp_path: Path) -> None:
    words = " ".join(TINY).replace("[]", "'[]'")
    done = in_shell(f"cifar_dist.train {words} --out {tmp_path}", redirections)
    assert (done.returncode, done.stderr) == (0, "")
    assert status_of(tmp_path)["state"] == "finished"
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "finished at step 20" in log
    assert "warning" not in log


@pytest.mark.parametrize("redirections", CLOSED)
@pytest.mark.parametrize("verb", ["plan --config smoke", "absent"])
def test_a_command_with_closed_streams_keeps_its_exit_code(verb: str, redirections: str) -> None:
    done = in_shell(f"cifar_dist {verb}", redirections)
    assert done.returncode == (2 if verb == "absent" else 0)
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("redirections", CLOSED)
@pytest.mark.parametrize(
    "verb",
    [
        "evaluate --checkpoint {run}",
        "predict --checkpoint {run} {image}",
        "doctor --config smoke",
        "convert {run} {out}",
        "verify {run}",
    ],
)
def test_every_command_works_with_closed_streams(
    verb: str, redirections: str, trained: Result, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "set", {"test": 3})
    words = verb.format(run=trained.out, image=root, out=tmp_path / "out.safetensors")
    done = in_shell(f"cifar_dist {words}", redirections)
    expected = run_command([sys.executable, "-m", "cifar_dist", *words.split()]).returncode
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    code = (
        "import sys, os; from cifar_dist.command import run_verb;"
        f"run_verb(lambda _: print(open({str(tmp_path / 'x')!r}, 'w').fileno(), "
        f"os.system('echo from a library'), file=open({str(tmp_path / 'said')!r}, 'w')) or 0, [])"
    )
    subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=True)
    number, status = (tmp_path / "said").read_text().split()
    assert int(number) > 2
    assert status == "0"  # a child process inherits a stream that it can write
    assert (tmp_path / "x").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_command_with_output_to_a_full_disk_reports_it_in_one_line() -> None:
    done = in_shell("cifar_dist plan --config smoke", "> /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: cannot write to stdout (No space left on device)\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_run_with_output_to_a_full_disk_finishes_with_a_warning(tmp_path: Path) -> None:
    words = " ".join(TINY).replace("[]", "'[]'")
    done = in_shell(f"cifar_dist.train {words} --out {tmp_path}", "> /dev/full 2> /dev/full")
    assert done.returncode == 0
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert log.count("warning") == 1
    assert "warning: the console failed, training goes on (OSError: [Errno 28]" in log
    assert "finished at step 20" in log


def test_an_error_written_to_a_closed_pipe_keeps_its_exit_code() -> None:
    line = (
        f"{sys.executable} -m cifar_dist plan --config absent 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


ODD = os.fsdecode(b"caf\xe9")  # not UTF-8, as in archives from Windows
STREAMS = {
    "strict UTF-8": {"PYTHONIOENCODING": "utf-8"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "no UTF-8 at all": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    "stream",
    [pytest.param(name, marks=pytest.mark.slow) for name in STREAMS],
)
def test_names_that_a_console_cannot_encode(stream: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / f"größe {ODD}", {"train": 60, "test": 9})
    for split in ("train", "test"):
        (root / split / "disc").rename(root / split / "größer Hund")
        images = sorted((root / split / "ring").iterdir())
        images[0].rename(images[0].with_name(f"{ODD}.png"))
    (root / "train" / "ring" / f"{ODD}-2.png").write_bytes(b"no image")
    out = tmp_path / f"Lauf {ODD}"
    options = ["--data.name", "imagefolder", "--data.root", str(root), "--out", str(out)]
    options += ["--data.bad_images", "skip", "--train.batch_size", "20"]
    for epochs in ("1", "2"):  # the second resumes the run
        done = run_command(
            [*command(), *TINY, *options, "--train.epochs", epochs], **STREAMS[stream]
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert "failed, training goes on" not in done.stdout
    assert "continues at step" in done.stdout
    written = json.loads((out / "run.json").read_text())["command"][-9]
    assert os.fsencode(written) == os.fsencode(root)
    done = run_command(
        [sys.executable, "-m", "cifar_dist", "evaluate", "--checkpoint", str(out)],
        **STREAMS[stream],
    )
    assert done.returncode == 0, done.stderr
    assert "9)" in done.stdout
    done = run_command(
        [
            sys.executable,
            "-m",
            "cifar_dist",
            "predict",
            "--checkpoint",
            str(out),
            str(root / "test"),
        ],
        **STREAMS[stream],
    )
    assert done.returncode == 0, done.stderr
    assert "Hund" in done.stdout
    assert "caf\\udce9.png: " in done.stdout


def text_files_opened(tree: ast.AST) -> list[ast.Call]:
    """Return the calls that open a file as text."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        name = function.rpartition(".")[2]
        words = {n.value for a in call.args for n in ast.walk(a) if isinstance(n, ast.Constant)}
        binary = any("b" in word for word in words if isinstance(word, str) and len(word) <= 3)
        if name in ("read_text", "write_text") or (
            name == "open"
            and not binary
            and not function.startswith(("os.", "Image.", "tarfile.", "urllib."))
        ):
            found.append(call)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_files_are_read_and_written_in_utf8_whatever_the_locale(path: Path) -> None:
    calls = text_files_opened(ast.parse(path.read_text(encoding="utf-8")))
    without = [c.lineno for c in calls if "encoding" not in {word.arg for word in c.keywords}]
    assert without == []
