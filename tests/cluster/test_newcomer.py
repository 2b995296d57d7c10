"""The ten commands of the README, exactly as written, produce metrics in Prometheus."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.support.prometheus import needs_prometheus

pytestmark = [pytest.mark.ray, needs_prometheus]
_HEADING = "## From nothing to numbers in Prometheus\n"
# Root needs no sudo, and it may not be installed.
_BEFORE = 'set -e -o pipefail\nsudo() { "$@"; }\nexport DEBIAN_FRONTEND=noninteractive\n'


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().partition(_HEADING)[2].partition("\n## ")[0]
    return [line.strip() for line in re.findall(r"(?m)^    (?=\S)(.+)$", section)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the checkout that uses this environment as its own."""
    unwanted = shutil.ignore_patterns(".git", ".venv*", "runs", "dist", "*cache*", "*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=unwanted)
    bin_folder = tmp_path / "checkout" / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").symlink_to(Path(sys.executable).parent / "activate")
    (bin_folder.parent / ".ready").touch()  # `make setup` has nothing to do, as in an installed checkout
    return tmp_path / "checkout"


def test_the_commands_of_the_readme_work(checkout: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the first command installs a package, which needs root")
    listed = commands()
    assert 5 < len(listed) <= 10
    script = _BEFORE + "".join(f"echo '::: {number}'\n{line}\n" for number, line in enumerate(listed))
    done = subprocess.run(
        ["bash", "-c", script + "wait\n"],
        cwd=checkout,
        # As for a new user: the run writes its target file to the default folder.
        env={
            name: value
            for name, value in ENVIRONMENT.items()
            if name not in ("PYTHONPATH", "ORCHESTRATOR_TARGETS")
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    said = re.split(r"(?m)^::: \d+\n", done.stdout)[1:]
    # The last command stops Prometheus, which `wait` then reports.
    assert len(said) == len(listed), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    (answer,) = [text for line, text in zip(listed, said, strict=True) if line.startswith("promtool query")]
    shown = {rank: float(value) for rank, value in re.findall(r'rank="(\d)".*?=> ([\d.]+) @', answer)}
    assert sorted(shown) == ["0", "1"], answer
    (report,) = [
        text for line, text in zip(listed, said, strict=True) if line.startswith("orchestrator report")
    ]
    (tgs,) = re.findall(r"(?m)^TGS +([\d.]+) tokens", report)
    # The last scraped step against the mean of the run, on two cores with other load.
    assert min(shown.values()) > 0.2 * float(tgs)
    assert (checkout / "model" / "model.safetensors").exists()
