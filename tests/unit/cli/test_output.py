"""Output to closed, full or ASCII streams, and unexpected errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.output import TolerantStream, describe_unexpected
from tests.conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.process

PLAN = "-m orchestrator plan launch/jobs/quickstart.yaml --gpus 8xA100-80G-SXM --explain"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, where `PLAN` prints about 4 KiB with non-ASCII characters to stdout."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line.replace('PLAN', f'{sys.executable} {PLAN}')}"],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("PLAN | true", 0, ""),
        ("PLAN >&-", 0, ""),
        ("PLAN 2>&-", 0, ""),
        ("PLAN > /dev/full", 3, "cannot write the result to stdout (No space left on device)"),
    ],
)
def test_closed_and_full_streams(line: str, code: int, words: str) -> None:
    done = shell(line)
    assert (done.returncode, "Traceback" in done.stderr, "Exception ignored" in done.stderr) == (
        code,
        False,
        False,
    )
    assert words in done.stderr


def test_characters_outside_the_encoding_are_escaped() -> None:
    done = shell("PLAN", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\xb1" in done.stdout


def test_a_tolerant_stream_ignores_write_errors() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        stream = TolerantStream(full)
        stream.write("lost\n")
        stream.write("lost as well\n")
    TolerantStream(full).write("closed by now\n")


def test_an_unexpected_error_is_one_line_with_a_traceback_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        raise KeyError("lost\nkey")
    except KeyError as error:
        message = describe_unexpected(error)
    (file,) = tmp_path.iterdir()
    assert message.startswith("unexpected error: KeyError: ")
    assert "\n" not in message
    assert str(file) in message
    assert "Traceback (most recent call last)" in file.read_text()
