"""An HTTP server for one page of text that changes all the time."""

from __future__ import annotations

import errno
import gzip
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import Any, Literal

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATHS = ("/metrics", "/")
AUTO_PORTS = range(9400, 9500)
"""Where `auto` looks for a free port."""
_FASTEST = 1  # series of ranks repeat themselves, and shrink well at any level


class Endpoint:
    """Serves the text that a function returns, at /metrics.

    Args:
        host: Address to listen on.
        port: Port; 0 takes any free one, auto the first free one of `AUTO_PORTS`.
        page: Called for every scrape, from a thread of its own.

    Raises:
        OSError: The port is taken or the address is not this machine's.
        UnicodeError: The address cannot be a name.
    """

    def __init__(self, host: str, port: int | Literal["auto"], page: Callable[[], str]) -> None:
        family = family_of(host)

        class Server(_Server):
            address_family = family

        ports = AUTO_PORTS if port == "auto" else range(port, port + 1)
        for number in ports:
            try:  # the server holds the port from here on: of two runs that try it at once, one goes on
                self._server = Server((host, number), _handler(page))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or number == ports[-1]:
                    raise
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Port that is served."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def family_of(host: str) -> socket.AddressFamily:
    """Return the family of the addresses that a host's name stands for.

    Raises:
        OSError: The name stands for none.
        UnicodeError: It cannot be a name.
    """
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks for the host's full name, which can take long


def _handler(page: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            """Answer a scrape."""
            if self.path.split("?")[0] not in _PATHS:
                self.send_error(404, "the metrics are at /metrics")
                return
            body = page().encode()
            packed = "gzip" in self.headers.get("Accept-Encoding", "")
            if packed:
                body = gzip.compress(body, _FASTEST)
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            if packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keep quiet: a line a scrape tells nobody anything."""

    return Handler
