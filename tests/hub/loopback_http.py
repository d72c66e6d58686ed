"""The HTTP side of the loopback Hub: requests, answers, and what may go wrong between them."""

import json
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with a request; see `LoopbackHub.inject`."""

    pattern: re.Pattern[str]
    status: int | None
    retry_after: float | None
    cut: str | None
    slow: float
    skip: int
    times: int | None

    def strikes(self, request: str) -> bool:
        if self.times == 0 or not self.pattern.match(request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes = b""
    user: str | None = None
    role: str | None = None
    status: int | None = None

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    @property
    def host(self) -> str:
        return self.headers.get("Host", "")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def answer_json(data: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(data).encode(), status, {"Content-Type": "application/json"})


def read(content: bytes, request: Request) -> Answer:
    """The content of a file, or the part of it that a client which was cut off still needs."""
    known = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if match is None:
        return Answer(content, headers=known)
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return Answer(content[first : last + 1], 206, known | part)


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error; anything else is a bug of this file and is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets a fault strike or the hub answer, and writes the answer."""

    hub: Any
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes, of which the second would wait for the client to acknowledge the first.
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        """Nothing: what came in is in `hub.requests`."""

    def handle_any(self) -> None:
        hub, address = self.hub, urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        request = Request(self.command, address.path, query, self.headers)
        with hub.lock:
            hub.requests.append(request)
            fault = next((f for f in hub.faults if f.strikes(f"{self.command} {unquote(self.path)}")), None)
        cut = fault.cut if fault is not None else None
        if cut == "request":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._hang_up()
        request.body = self._body()
        if fault is not None:
            time.sleep(fault.slow)
        if fault is not None and fault.status is not None:
            again = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            answer = Answer(b'{"error": "injected"}', fault.status, again)
        else:
            answer = self._answer(request)
        request.status = answer.status
        self._send(answer, is_cut=cut == "answer")

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = handle_any

    def _answer(self, request: Request) -> Answer:
        try:
            with self.hub.lock:
                return self.hub.route(request)
        except Refused as error:
            answer = answer_json({"error": str(error)}, error.status)
            answer.headers |= error.headers
            return answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, is_cut: bool) -> None:
        body = b"" if self.command == "HEAD" else answer.body
        if is_cut and not body:
            return self._hang_up()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
