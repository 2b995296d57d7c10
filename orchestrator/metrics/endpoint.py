"""HTTP server for the Prometheus text format."""

from __future__ import annotations

import errno
import gzip
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import Literal

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATHS = ("/metrics", "/")
AUTO_PORTS = range(9400, 9500)
"""Ports tried for `metrics.port: auto`."""
_GZIP_LEVEL = 1  # per-rank series are repetitive and compress well at any level


class Endpoint:
    """Serves the result of a function at /metrics.

    Args:
        host: Address to listen on.
        port: Port; 0 uses any free port, auto the first free port of `AUTO_PORTS`.
        page: Called for every scrape in a separate thread; returns the response body.

    Raises:
        OSError: The port is in use or the address does not belong to this machine.
        UnicodeError: The host is not a valid name.
    """

    def __init__(self, host: str, port: int | Literal["auto"], page: Callable[[], str]) -> None:
        family = family_of(host)

        class Server(_Server):
            address_family = family

        ports = AUTO_PORTS if port == "auto" else range(port, port + 1)
        for number in ports:
            try:  # binds the port: of two runs that try it concurrently, one continues with the next
                self._server = Server((host, number), _handler(page))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or number == ports[-1]:
                    raise
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Port of the server."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def family_of(host: str) -> socket.AddressFamily:
    """Return the address family of a host.

    Raises:
        OSError: The name cannot be resolved.
        UnicodeError: The host is not a valid name.
    """
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's method does a slow reverse DNS lookup


def _handler(page: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            """Handle a scrape."""
            if self.path.split("?")[0] not in _PATHS:
                self.send_error(404, "the metrics are at /metrics")
                return
            body = page().encode()
            compress = "gzip" in self.headers.get("Accept-Encoding", "")
            if compress:
                body = gzip.compress(body, _GZIP_LEVEL)
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            if compress:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    return Handler
