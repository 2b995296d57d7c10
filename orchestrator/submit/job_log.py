"""Follows the log of a submitted job: every line exactly once and in order, across reconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import aiohttp
from ray.exceptions import AuthenticationError

FAILURES = (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError, aiohttp.ClientError)
"""Exceptions that Ray's job client raises if a cluster does not respond as expected."""
_SECONDS_BETWEEN_TRIES = 2.0
_LONGEST_WAIT = 60.0
_SECONDS_OF_SILENCE = 30.0  # without log output, before the connection is checked


class JobStatus(Protocol):
    """Ray's JobStatus, a string enumeration."""

    def is_terminal(self) -> bool:
        """Return whether the job has ended."""


class JobDetails(Protocol):
    """The used part of Ray's JobDetails."""

    @property
    def status(self) -> JobStatus:
        """Status of the job."""

    @property
    def driver_exit_code(self) -> int | None:
        """Exit code of the entrypoint; None if it did not run."""

    @property
    def message(self) -> str | None:
        """Reason of the status."""


class Response(Protocol):
    """The used part of an HTTP response of requests."""

    status_code: int

    def json(self) -> object:
        """Return the parsed body."""


class JobClient(Protocol):
    """The used part of Ray's JobSubmissionClient."""

    def get_job_info(self, job_id: str, /) -> JobDetails:
        """Return status and exit code of a job."""

    def get_job_logs(self, job_id: str, /) -> str:
        """Return the log so far."""

    def tail_job_logs(self, job_id: str, /) -> AsyncIterator[str]:
        """Stream the log from its beginning until the job ends."""

    def stop_job(self, job_id: str, /) -> object:
        """Request a job to stop."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, object],
        metadata: dict[str, str],
    ) -> str:
        """Submit a job and return its submission ID."""

    def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None) -> Response: ...


class JobLog:
    """The log of one job; buffers only an incomplete last line.

    Args:
        client: Ray's job client.
        submission_id: Submission ID of the job.
        on_line: Called with each line, without its newline.
    """

    def __init__(self, client: JobClient, submission_id: str, on_line: Callable[[str], None]) -> None:
        self._client, self._submission_id, self._on_line = client, submission_id, on_line
        self._consumed = 0  # characters
        self._partial_line = ""

    def follow(self) -> JobDetails:
        """Pass every line to `on_line` until the job ends.

        If the stream breaks (proxies close idle streams, and some block streaming entirely), the log is
        fetched by a plain request and the stream is reopened. An error is raised only if both fail.

        Returns:
            Ray's JobDetails in a terminal state.

        Raises:
            ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError: The cluster cannot be
                reached anymore.
        """
        wait = _SECONDS_BETWEEN_TRIES
        while True:
            before, complete = self._consumed, True
            try:
                asyncio.run(self._stream())
            except FAILURES:
                complete = False
            details = self._client.get_job_info(self._submission_id)
            if not complete:
                self._consume(self._client.get_job_logs(self._submission_id), 0)
            if details.status.is_terminal():
                break
            wait = _SECONDS_BETWEEN_TRIES if self._consumed > before else min(2 * wait, _LONGEST_WAIT)
            time.sleep(wait)
        if self._partial_line:
            self._on_line(self._partial_line)
            self._partial_line = ""
        return details

    async def _stream(self) -> None:
        """Stream the log; the server always starts at its beginning and ends with the job."""
        position = 0
        chunks = aiter(self._client.tail_job_logs(self._submission_id))
        while True:
            next_chunk = asyncio.ensure_future(anext(chunks))
            try:
                # A silently lost connection looks like a job without output, so poll the job info.
                while not (await asyncio.wait({next_chunk}, timeout=_SECONDS_OF_SILENCE))[0]:
                    await asyncio.to_thread(self._client.get_job_info, self._submission_id)
                text = next_chunk.result()
            except StopAsyncIteration:
                return
            finally:
                next_chunk.cancel()
            self._consume(text, position)
            position += len(text)

    def _consume(self, text: str, position: int) -> None:
        """Process a chunk of the log that starts at a character position; skip what was consumed before."""
        new = text[max(0, self._consumed - position) :]
        self._consumed = max(self._consumed, position + len(text))
        *lines, self._partial_line = (self._partial_line + new).split("\n")
        for line in lines:
            self._on_line(line)
