"""Findings about a launch: a code, a level, the problem, and the fix."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

LEVELS = ("note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One problem of a launch.

    Attributes:
        code: a stable name, for scripts.
        level: with an error the run cannot work; with a warning it may be slow or wrong.
        message: the problem, with the found and the expected value.
        fix: what to do.
    """

    code: str
    level: Literal["note", "warning", "error"]
    message: str
    fix: str


def error(code: str, message: str, fix: str) -> Finding:
    """Return a finding with which the run cannot work."""
    return Finding(code, "error", message, fix)


def warning(code: str, message: str, fix: str) -> Finding:
    """Return a finding with which the run may be slow or wrong."""
    return Finding(code, "warning", message, fix)


def note(code: str, message: str, fix: str) -> Finding:
    """Return a finding for information."""
    return Finding(code, "note", message, fix)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0, 1 if there is a warning, or 2 if there is an error."""
    return max((LEVELS.index(finding.level) for finding in findings), default=0)


def show(
    findings: Sequence[Finding], facts: dict[str, Any], as_json: bool, file: TextIO | None = None
) -> int:
    """Print facts and findings, as text or as one JSON object, and return the exit code.

    Args:
        file: where text is printed; None is standard output.
    """
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({**facts, "findings": listed}, indent=1))
        return exit_code(findings)
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}", file=file)
    for finding in sorted(findings, key=lambda f: -LEVELS.index(f.level)):
        print(f"{finding.level}: {finding.message}; {finding.fix} [{finding.code}]", file=file)
    if not findings:
        print("no problems found", file=file)
    return exit_code(findings)
