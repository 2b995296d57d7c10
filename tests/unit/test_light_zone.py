"""Modules for validation and planning import no framework."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "ray", "deepspeed", "transformers", "peft", "datasets")
LIGHT = [
    "orchestrator",
    "orchestrator.errors",
    "orchestrator.shutdown",
    "orchestrator.train.resume",  # starting a finished run again must be fast
    "orchestrator.config.schema",
    "orchestrator.config.loader",
    "orchestrator.checks.job",
    "orchestrator.checks.warnings",
    "orchestrator.parallel.parallel_dims",
    "orchestrator.parallel.deepspeed_config",
    "orchestrator.data.packing",
    "orchestrator.data.balance",
    "orchestrator.metrics.catalogue",
    "orchestrator.arch.flops",
    "orchestrator.metrics.meter",
    "orchestrator.bench.report",
    "orchestrator.kubernetes.rayjob",
    "orchestrator.kubernetes.pod_sizing",
    "tests.support.kubernetes_lint",
    *(
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for room in ("arch", "planner", "cluster", "config")
        for file in (ROOT / "orchestrator" / room).glob("*.py")
    ),
]
EXISTING = sorted(
    name.removesuffix(".__init__")
    for name in LIGHT
    if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() or (ROOT / name.replace(".", "/")).is_dir()
)


def loaded_by(statement: str) -> str:
    """Run a statement in a fresh Python and return the frameworks that it loaded."""
    code = f"import sys\n{statement}\nprint(*[name for name in {FRAMEWORKS} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_list_is_not_empty() -> None:
    assert {
        "orchestrator.cluster.placement",
        "orchestrator.arch.model_dims",
        "orchestrator.config.loader",
    } <= set(EXISTING)


def test_light_modules_load_no_framework() -> None:
    assert loaded_by("\n".join(f"import {name}" for name in EXISTING)) == ""


@pytest.mark.parametrize("name", ["orchestrator.model.attention"])
def test_a_module_outside_the_zone_would_be_seen(name: str) -> None:
    assert "torch" in loaded_by(f"import {name}")


def test_a_job_is_read_and_rendered_without_a_framework() -> None:
    statement = (
        "from pathlib import Path\nfrom orchestrator.config.loader import dump, json_schema, load\nfrom "
        "orchestrator.parallel.deepspeed_config import render\njob = "
        "load(Path('launch/jobs/quickstart.yaml'))\nassert dump(job) and json_schema() and render(job, "
        "'bf16', 'cuda')"
    )
    assert loaded_by(statement) == ""
