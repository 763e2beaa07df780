"""A proxy in front of the S3 server of the tests that spoils requests and answers."""

import http.client
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

Headers = dict[str, str]


class Spoiler:
    """What the proxy does to each request. The defaults do nothing."""

    def change_request(self, headers: Headers) -> None:
        """Change the headers that the server gets."""

    def refuse(self, method: str, path: str) -> str:
        """The code of an error of S3 instead of an answer; empty: ask the server."""
        return ""

    def change_answer(self, headers: Headers) -> None:
        """Change the headers that the client gets."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextmanager
def spoil(endpoint: str, spoiler: Spoiler) -> Iterator[str]:
    """The URL of a proxy of `endpoint`."""
    target = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = dict(self.headers.items())
            if code := spoiler.refuse(self.command, self.path):
                text = f"<Error><Code>{code}</Code><Message>refused by the test</Message></Error>".encode()
                self._answer(403, {"Content-Type": "application/xml"}, text)
                return
            spoiler.change_request(headers)
            connection = http.client.HTTPConnection(target, timeout=30)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content, given = answer.read(), dict(answer.getheaders())
            connection.close()
            spoiler.change_answer(given)
            self._answer(answer.status, given, content)

        def _answer(self, status: int, headers: Headers, content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - the names of http.server

        def log_message(self, *_: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
