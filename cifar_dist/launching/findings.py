"""What is found about a launch: a code, how bad it is, what it is, and what to do about it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LEVELS = ("note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing to know before, or after, a launch.

    Attributes:
        code: a name that stays the same, for scripts.
        level: an error keeps the run from working; a warning may make it slow or wrong.
        message: what was found, and what was expected.
        fix: what to do.
    """

    code: str
    level: Literal["note", "warning", "error"]
    message: str
    fix: str


def error(code: str, message: str, fix: str) -> Finding:
    """Return what keeps the run from working."""
    return Finding(code, "error", message, fix)


def warning(code: str, message: str, fix: str) -> Finding:
    """Return what may make the run slow or wrong."""
    return Finding(code, "warning", message, fix)


def note(code: str, message: str, fix: str) -> Finding:
    """Return what is good to know."""
    return Finding(code, "note", message, fix)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0, 1 if there is a warning, or 2 if there is an error."""
    return max((LEVELS.index(finding.level) for finding in findings), default=0)


def show(findings: Sequence[Finding], facts: dict[str, Any], as_json: bool) -> int:
    """Print facts and findings, for people or as one JSON object, and return the exit code."""
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({**facts, "findings": listed}, indent=1))
        return exit_code(findings)
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for finding in sorted(findings, key=lambda f: -LEVELS.index(f.level)):
        print(f"{finding.level}: {finding.message}; {finding.fix} [{finding.code}]")
    if not findings:
        print("nothing wrong was found")
    return exit_code(findings)
