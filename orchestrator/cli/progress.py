"""Progress output of a run: lines with step, loss, TGS and remaining time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.run.recorder import Status

_SECONDS_BETWEEN_LINES = 2.0
_logger = logging.getLogger(__name__)


class Progress:
    """Logs the status of a run, at most one line every two seconds."""

    def __init__(self) -> None:
        self._attempt = 0
        self._step = -1
        self._printed = 0.0

    def __call__(self, status: Status) -> None:
        """Log a status of the recorder."""
        if status.attempt != self._attempt:
            self._attempt, self._step = status.attempt, -1
            where = f", metrics on port {status.metrics_port}" if status.metrics_port else ""
            again = f"attempt {status.attempt}: " if status.attempt > 1 else ""
            _logger.info(f"{again}training from step {status.start} of {status.steps}{where}")
        due = time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES or status.step == status.steps
        if status.step > self._step and status.latest and due and status.latest["step"] == status.step:
            self._step, self._printed = status.step, time.monotonic()
            row = status.latest
            _logger.info(
                f"step {status.step}/{status.steps}  loss {row['loss']:.4f}  TGS {row['tgs']:.0f}  "
                f"lr {row['learning_rate']:.2e}  left {_duration(status.eta_seconds)}"
            )
        for note in status.notes:
            _logger.info(note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
