"""Following the log of a submitted job: every line once, in order, also when the connection breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError

FAILURES = (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError, aiohttp.ClientError)
"""What Ray's client raises where a cluster does not answer as it should."""
_SECONDS_BETWEEN_TRIES = 2.0
_LONGEST_WAIT = 60.0
_SECONDS_OF_SILENCE = 30.0


class JobLog:
    """The log of one job, of which only an unfinished line is held in memory.

    Args:
        client: Ray's client.
        identity: The job's submission id.
        say: Called with each line, without its end.
    """

    def __init__(self, client: Any, identity: str, say: Callable[[str], None]) -> None:
        self._client, self._identity, self._say = client, identity, say
        self._seen = 0  # characters
        self._rest = ""

    def follow(self) -> Any:
        """Pass on every line until the job ends.

        A stream that breaks (a proxy ends idle ones, and some let none through) is opened again, and the log
        is fetched in between; only where this fails too is the cluster lost.

        Returns:
            The job's last state, as Ray describes it.

        Raises:
            ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError: The cluster is lost.
        """
        wait = _SECONDS_BETWEEN_TRIES
        while True:
            before, whole = self._seen, True
            try:
                asyncio.run(self._stream())
            except FAILURES:
                whole = False
            details = self._client.get_job_info(self._identity)
            if not whole:
                self._take(self._client.get_job_logs(self._identity), 0)
            if details.status.is_terminal():
                break
            wait = _SECONDS_BETWEEN_TRIES if self._seen > before else min(2 * wait, _LONGEST_WAIT)
            time.sleep(wait)
        if self._rest:
            self._say(self._rest)
            self._rest = ""
        return details

    async def _stream(self) -> None:
        """Read the log as it grows; the server begins at its start and ends with the job."""
        position = 0
        pieces = aiter(self._client.tail_job_logs(self._identity))
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            try:
                # A connection that is lost in silence looks like a job that says nothing.
                while not (await asyncio.wait({coming}, timeout=_SECONDS_OF_SILENCE))[0]:
                    await asyncio.to_thread(self._client.get_job_info, self._identity)
                text = coming.result()
            except StopAsyncIteration:
                return
            finally:
                coming.cancel()
            self._take(text, position)
            position += len(text)

    def _take(self, text: str, position: int) -> None:
        """Pass on what is new of a piece of the log that begins at a position."""
        fresh = text[max(0, self._seen - position) :]
        self._seen = max(self._seen, position + len(text))
        *lines, self._rest = (self._rest + fresh).split("\n")
        for line in lines:
            self._say(line)
