"""Console messages: plain lines, at a level that the user chooses."""

import io
import logging
from collections.abc import Iterator

import pytest

from orchestrator.console_log import console_log

_logger = logging.getLogger("orchestrator.somewhere")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("orchestrator")
    handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def lines(level: str | None = None) -> list[str]:
    out = io.StringIO()
    console_log(out, level)
    _logger.debug("shapes")
    _logger.info("100 % done")
    _logger.warning("slow")
    return out.getvalue().splitlines()


def test_info_is_the_message_alone_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_LOG", raising=False)
    assert lines() == ["100 % done", "warning: slow"]


def test_the_level_is_that_of_the_flag_the_earlier_call_or_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_LOG", "warning")
    assert lines() == ["warning: slow"]
    assert lines("debug") == ["debug orchestrator.somewhere: shapes", "100 % done", "warning: slow"]
    assert len(lines()) == 3, "a later stream keeps the level"


def test_a_stream_replaces_the_one_before() -> None:
    first = io.StringIO()
    console_log(first, "info")
    assert lines("info") == ["100 % done", "warning: slow"]
    assert first.getvalue() == ""


def test_an_unknown_level_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--log-level=loud is not a log level; use debug, info, warning or"):
        console_log(io.StringIO(), "loud")
    monkeypatch.setenv("ORCHESTRATOR_LOG", "7")
    with pytest.raises(ValueError, match="ORCHESTRATOR_LOG=7 is not a log level"):
        console_log(io.StringIO())
