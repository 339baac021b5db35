"""An S3-speaking server on the loopback, one a session, and a proxy before it that fails when told to."""

import http.client
import logging
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from cache_spec.store import Patience
from cache_spec.store_path import StorePath, place_of

BUCKET = "caches"
IMPATIENT = Patience(n_tries=4, first_wait=0.01, longest_wait=0.05, stall_seconds=2.0, request_seconds=10.0)
Kind = Literal["drop", "lost", "status", "slow", "truncate", "corrupt", "endless"]
_PIECE = 2**16
_HOP = ("connection", "transfer-encoding", "keep-alive", "server", "date")


@dataclass(kw_only=True)
class Fault:
    """What becomes of a request whose line (`GET /caches/...`) holds `match`, `times` times or for some seconds.

    drop: no answer, and the server never hears of it. lost: the server does it, and the answer is dropped. status:
    `status` instead of the server's answer. slow: a pause of `seconds` before every piece of `n_bytes`. truncate: only
    the first `n_bytes` of the body, and the connection ends. corrupt: one bit of byte `n_bytes` of the body is changed.
    endless: headers that tell of the body, then `n_bytes` of something else, while anybody listens.
    """

    kind: Kind
    match: str = ""
    times: int = 1
    until: float = 0.0  # on the monotonic clock; times is not looked at
    status: int = 500
    seconds: float = 0.1
    n_bytes: int = 100
    n_sent: int = 0  # of an endless body


class Proxy:
    """Passes requests on to the server at `target`, and has faults."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.removeprefix("http://").partition(":")
        self._port = int(port)
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # the line of each, as it came
        self.n_failed = 0

    def fail(self, kind: Kind, **facts) -> None:
        """From now on; see Fault. `for_seconds` instead of `times`."""
        seconds = facts.pop("for_seconds", 0.0)
        self.faults.append(Fault(kind=kind, until=time.monotonic() + seconds if seconds else 0.0, **facts))

    def _fault(self, line: str) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.match in line and (fault.times > 0 if not fault.until else time.monotonic() < fault.until):
                    fault.times -= 1
                    self.n_failed += 1
                    return fault
        return None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self._fault(f"{request.command} {request.path}")
        kind = fault.kind if fault else ""
        if fault and kind == "drop":
            _hang_up(request)
            return
        if fault and kind == "status":
            _send(request, fault.status, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        connection = http.client.HTTPConnection(self._host, self._port, timeout=30)
        try:
            connection.request(request.command, request.path, body, dict(request.headers))
            found = connection.getresponse()
            data = found.read()
        finally:
            connection.close()
        if fault and kind == "lost":
            _hang_up(request)
            return
        headers = {name: value for name, value in found.getheaders() if name.lower() not in _HOP}
        if fault and kind == "corrupt" and len(data) > fault.n_bytes:
            data = bytearray(data)
            data[fault.n_bytes] ^= 1
        _send(request, found.status, headers, bytes(data), fault)


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, fault: Fault | None = None
) -> None:
    request.send_response(status)
    length = headers.pop("Content-Length", None) if request.command == "HEAD" else None
    headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
    if fault and fault.kind == "endless":
        headers["Transfer-Encoding"] = "chunked"
    for name, value in {**headers, "Content-Length": length or str(len(data))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "HEAD":
        return
    if fault and fault.kind == "truncate":
        request.wfile.write(data[: min(fault.n_bytes, max(0, len(data) - 1))])
        _hang_up(request)
    elif fault and fault.kind == "endless":
        for _ in range(fault.n_bytes // _PIECE):
            request.wfile.write(b"%x\r\n%b\r\n" % (_PIECE, bytes(_PIECE)))
            fault.n_sent += _PIECE
        _hang_up(request)
    elif fault and fault.kind == "slow":
        for start in range(0, len(data), fault.n_bytes):
            time.sleep(fault.seconds)
            request.wfile.write(data[start : start + fault.n_bytes])
    else:
        request.wfile.write(data)


def _hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    with suppress(OSError):
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def store_server() -> Iterator[str]:
    """The address of an S3-speaking server with an empty bucket `caches`."""
    pytest.importorskip("obstore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to mend
        moto_server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store_url(store_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in the store, which the environment (of processes started too) leads to."""
    credentials(monkeypatch, store_server)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/cache.zarr"


@pytest.fixture
def folder_root(tmp_path: Path) -> StorePath:
    """A store that is a folder: the same steps, in a hundredth of the time."""
    pytest.importorskip("obstore")
    found = place_of(f"file://{tmp_path}/store", IMPATIENT)
    assert isinstance(found, StorePath)
    return found


@pytest.fixture
def proxy(store_url: str, store_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The same place (take `store_url` too) with a proxy before it."""
    found = Proxy(store_server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # the client has lost its patience
                found.answer(self)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield found
    server.shutdown()
    server.server_close()


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The environment of someone who may use the store at an address."""
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    facts = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "hush-hush", "AWS_REGION": "us-east-1"}
    for name, value in {**facts, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
