"""A hub that is written to, on the loopback: repositories with commits, of users known by their tokens."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import pytest
from hub_fixtures import send_json, served
from huggingface_hub import constants

TOKENS = {"hf_owners": "owner", "hf_others": "other"}  # token -> user
_SMALL = (".json", ".md", ".txt", ".gitattributes")  # what is no large file to a hub, by its name


@dataclass
class Repo:
    """Files by name, and the commits that put them there."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"* filter=lfs\n"})
    commits: list[list[str]] = field(default_factory=list)  # the names of each commit's files

    @property
    def sha(self) -> str:
        """The commit that the repository is at."""
        return f"{len(self.commits) + 1:040x}"


class HubStore:
    """`fate(method, path, n)` may answer the n-th request with a status instead; None lets it pass."""

    def __init__(self, fate: Callable[[str, str, int], int | None] = lambda method, path, n: None) -> None:
        self.fate = fate
        self.repos: dict[tuple[str, str], Repo] = {}  # ("models", "owner/name")
        self.large: dict[str, bytes] = {}  # SHA-256 -> content
        self.requests: list[str] = []
        self.address = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _chunks(request)
        self.requests.append(f"{request.command} {path}")
        if status := self.fate(request.command, path, len(self.requests)):
            send_json(request, status, {"error": "as told"})
        elif request.headers.get("Authorization") and not self._user(request):
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            send_json(request, 401, {"error": "Invalid credentials"}, said)
        elif path == "/api/validate-yaml":
            send_json(request, 200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(request, json.loads(body))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            self._api(request, found[1], found[2], found[3] or "", body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(request, json.loads(body)["objects"])
        elif path.startswith("/large/"):
            self.large[path.rpartition("/")[2]] = body
            send_json(request, 200, {})
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(request, "datasets" if found[1] else "models", found[2], found[4])
        else:
            send_json(request, 404, {"error": "not found"})

    def _user(self, request: BaseHTTPRequestHandler) -> str | None:
        return TOKENS.get((request.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _visible(self, request: BaseHTTPRequestHandler, kind: str, name: str) -> Repo | None:
        repo = self.repos.get((kind, name))
        if repo is not None and repo.private and self._user(request) != name.split("/")[0]:
            return None
        return repo

    def _create(self, request: BaseHTTPRequestHandler, asked: dict) -> None:
        user, owner = self._user(request), asked.get("organization")
        key = (f"{asked.get('type', 'model')}s", f"{owner}/{asked['name']}")
        if user is None:
            send_json(request, 401, {"error": "Invalid credentials"})
        elif user != owner:
            send_json(request, 403, {"error": "not in your namespace"})
        else:
            self.repos.setdefault(key, Repo(private=asked.get("visibility") == "private" or bool(asked.get("private"))))
            send_json(request, 200, {"url": f"{self.address}/{key[1]}", "name": key[1]})

    def _api(self, request: BaseHTTPRequestHandler, kind: str, name: str, action: str, body: bytes) -> None:
        repo = self._visible(request, kind, name)
        if repo is None:
            status = 404 if self._user(request) else 401
            send_json(request, status, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif action.startswith("/tree/"):
            send_json(request, 200, [_entry(file, data) for file, data in repo.files.items()])
        elif action.startswith(("/preupload/", "/commit/")) and self._user(request) != name.split("/")[0]:
            send_json(request, 403, {"error": "not yours"})
        elif action.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            send_json(request, 200, {"files": [_mode(file["path"], repo) for file in asked]})
        elif action.startswith("/commit/"):
            self._commit(request, repo, f"{self.address}/{kind}/{name}", body)
        elif not action or action.startswith("/revision/"):
            facts = {"id": name, "sha": repo.sha, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
            send_json(request, 200, {**facts, "disabled": False, "siblings": []})
        else:
            send_json(request, 404, {"error": "not found"})

    def _batch(self, request: BaseHTTPRequestHandler, objects: list[dict]) -> None:
        def answer(asked: dict) -> dict:
            link = {"upload": {"href": f"{self.address}/large/{asked['oid']}"}}
            return {**asked, **({} if asked["oid"] in self.large else {"actions": link})}

        send_json(request, 200, {"transfer": "basic", "objects": [answer(asked) for asked in objects]})

    def _commit(self, request: BaseHTTPRequestHandler, repo: Repo, page: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.large[value["oid"]]
        repo.files |= added
        repo.commits.append(list(added))
        url = f"{page.replace('/models/', '/')}/commit/{repo.sha}"
        send_json(request, 200, {"commitUrl": url, "commitOid": repo.sha, "pullRequestUrl": None})

    def _send_file(self, request: BaseHTTPRequestHandler, kind: str, name: str, file: str) -> None:
        repo = self._visible(request, kind, name)
        if repo is None or file not in repo.files:
            code = "RepoNotFound" if repo is None else "EntryNotFound"
            send_json(request, 404, {"error": "not found"}, {"X-Error-Code": code})
            return
        data = repo.files[file]
        headers = {
            "X-Repo-Commit": repo.sha,
            "ETag": f'"{_entry(file, data)["oid"]}"',
            "Content-Length": str(len(data)),
        }
        request.send_response(200)
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)


def _chunks(request: BaseHTTPRequestHandler) -> bytes:
    data = b""
    while size := int(request.rfile.readline(), 16):
        data += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return data


def _is_large(file: str) -> bool:
    return not file.endswith(_SMALL)


def _entry(file: str, data: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry = {"type": "file", "path": file, "size": len(data), "oid": oid}
    if not _is_large(file):
        return entry
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return {**entry, "oid": sha256[:40], "lfs": pointer}


def _mode(file: str, repo: Repo) -> dict:
    there = _entry(file, repo.files[file]) if file in repo.files else {}
    oid = there.get("lfs", there).get("oid")
    return {"path": file, "uploadMode": "lfs" if _is_large(file) else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serving(store: HubStore) -> Iterator[str]:
    """The store's address, while it runs and while huggingface_hub in this process asks it."""
    with served(store) as address, pytest.MonkeyPatch.context() as patch:
        store.address = address
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_owners")
        yield address
