"""A hub of one data set on the loopback, which drops connections when told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol
from urllib.parse import unquote

COMMIT = "c0ffee00" * 5


class Answers(Protocol):
    """A hub: something that answers requests."""

    def answer(self, request: BaseHTTPRequestHandler) -> None: ...


class Hub:
    """Serves `files` (name -> bytes) as the data set owner/name. `fate(path, n)` says what becomes of the n-th download
    of a file: None lets it pass, a status answers with that, and a number of bytes below 0 cuts it off that far on."""

    def __init__(self, files: dict[str, bytes], fate: Callable[[str, int], int | None]) -> None:
        self.files, self.fate = files, fate
        self.downloads: list[str] = []
        self.requests: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.requests.append(f"{request.command} {request.path}")
        name = path.rpartition(f"{COMMIT}/")[2]
        if "/resolve/" in path and name in self.files:
            self._send_file(request, name)
        elif "/tree/" in path:
            folder = path.partition(COMMIT)[2].strip("/")
            rows = [self._entry(file) for file in self.files if not folder or file.startswith(f"{folder}/")]
            send_json(request, 200, [] if folder and not rows else rows)
        elif path.endswith("/paths-info/" + COMMIT):
            body = request.rfile.read(int(request.headers.get("Content-Length", 0))).decode()
            wanted = (
                json.loads(body)["paths"]
                if body.startswith("{")
                else [unquote(p.split("=")[1]) for p in body.split("&") if p.startswith("paths=")]
            )
            send_json(request, 200, [self._entry(file) for file in wanted if file in self.files])
        elif path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": file} for file in self.files]
            send_json(
                request,
                200,
                {
                    "id": "owner/name",
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                },
            )
        else:
            send_json(
                request,
                404,
                {"error": "not found"},
                {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"},
            )

    def _entry(self, file: str) -> dict:
        return {"type": "file", "path": file, "size": len(self.files[file]), "oid": "0" * 40}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": '"0"', "Accept-Ranges": "bytes"}
        start, end = 0, len(data)
        status = 200
        if asked := request.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            if start >= len(data):
                send_json(request, 416, {})
                return
        fate = None
        if request.command == "GET":
            self.downloads.append(name)
            fate = self.fate(name, len(self.downloads))
        if fate is not None and fate >= 400:
            send_json(request, fate, {"error": "busy"})
            return
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data[start:end] if fate is None else data[start : min(end, start - fate)])
            if fate is not None:
                request.close_connection = True


def send_json(
    request: BaseHTTPRequestHandler, status: int, found: object, headers: dict[str, str] | None = None
) -> None:
    """Answer with JSON."""
    body = json.dumps(found).encode()
    request.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@contextmanager
def served(hub: Answers) -> Iterator[str]:
    """The address of the hub, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes, and the second would wait for an answer

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
