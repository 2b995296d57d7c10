"""The line that a person sees when an attempt begins."""

from __future__ import annotations

import io

from orchestrator.cli.progress import Progress
from orchestrator.run.recorder import Status


def test_an_attempt_is_told_from_the_step_that_it_began_at() -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress(Status(attempt=2, start=3, step=7, steps=10))  # seen for the first time after four steps
    assert out.getvalue().startswith("attempt 2: training from step 3 of 10")
