"""docs/notebook.ipynb, run from top to bottom in a Jupyter kernel."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import JOB, Integers, free_port, needs, read_lines, tested

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_trains_on_several_processes_and_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Callable[..., Integers]
) -> None:
    needs("nbclient", "ipykernel", "nbformat")
    import nbclient
    import nbformat

    notebook = nbformat.read(FILE, as_version=4)
    cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    assert len(cells) == len(notebook.cells) - 1
    notebook.cells = cells
    for was, becomes in {'["--config", "smoke"]': repr(JOB), "29500": str(free_port())}.items():
        assert any(was in cell.source for cell in cells), was
        for cell in cells:
            cell.source = cell.source.replace(was, becomes)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the kernel
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = [
        "".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in cells
    ]
    assert any("2 processes on cpu" in text for text in printed)
    assert any("1 process on cpu" in text for text in printed)
    assert tested(tmp_path / "runs" / "several") == alone()
    assert tested(tmp_path / "runs" / "alone") == alone()
    assert read_lines(tmp_path / "runs" / "own")[-1]["epoch"] == 2


def test_the_notebook_is_committed_without_its_outputs() -> None:
    needs("nbformat")
    import nbformat

    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
