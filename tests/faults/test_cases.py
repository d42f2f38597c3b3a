"""docs/reliability.md: every case names a test that exists and has the case's `fault` marker."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def cases_of(file: Path, function: str) -> set[int]:
    """Return the numbers in the `fault` markers of a test function, its parameters included."""
    tree = ast.parse(file.read_text())
    found = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    calls = (node for decorator in found.decorator_list for node in ast.walk(decorator))
    return {
        int(argument.value)
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    }


def test_every_case_has_its_test() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\]\(\.\./(tests/\S+\.py)\) `(test_\w+)` \|$", text, re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 83))
    for number, file, function in rows:
        assert int(number) in cases_of(ROOT / file, function), (number, function)
