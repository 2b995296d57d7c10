"""Progress lines of a run."""

from __future__ import annotations

import pytest

from orchestrator.cli.progress import Progress
from orchestrator.run.recorder import Status


def test_an_attempt_is_logged_with_its_first_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orchestrator")
    Progress()(Status(attempt=2, start=3, step=7, steps=10))  # first status after four steps
    assert caplog.messages[0].startswith("attempt 2: training from step 3 of 10")
