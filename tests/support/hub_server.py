"""A model hub on loopback that speaks the API which huggingface_hub asks, for models that it is given as folders."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote, urlsplit

from tests.support.processes import LOOPBACK

CDN: Final = "127.0.0.2"
"""Large files lie on another host, which must not get the token."""
LFS_SUFFIXES: Final = {".safetensors", ".bin", ".h5", ".msgpack", ".onnx"}
"""Served by redirection to the CDN, with the file's size and hash in X-Linked-… headers, as the hub does."""


@dataclass
class HubModel:
    """One repository: the files of each commit, and the names of commits."""

    commits: dict[str, Path]
    refs: dict[str, str]
    is_gated: bool = False


@dataclass
class HubServer:
    """Serves the models that `add` was told. `asked` lists every request as `METHOD path`."""

    models: dict[str, HubModel] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    """Tokens that open gated models."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """Of these files the next reply ends after so many bytes; once each."""
    status: int | None = None
    """Every request is answered with this status."""
    has_cdn: bool = True
    """False for a mirror that sends large files itself."""
    tokens_at_cdn: list[str] = field(default_factory=list)
    _servers: list[_Server] = field(default_factory=list)

    def start(self) -> Self:
        """Listen on a free port of each address."""
        for address in (LOOPBACK, CDN):
            server = _Server((address, 0), self)
            self._servers.append(server)
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="hub-server", daemon=True
            ).start()
        return self

    def stop(self) -> None:
        """Close the ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return self._servers[0].url

    @property
    def cdn_url(self) -> str:
        """Where large files lie."""
        return self._servers[1].url

    def add(self, hub_id: str, folder: Path, *, ref: str = "main", is_gated: bool = False) -> str:
        """Publish the files of a folder as a new commit, and point `ref` to it; returns the commit."""
        content = "".join(f"{path.name}{path.stat().st_size}" for path in sorted(folder.iterdir()))
        commit = hashlib.sha1(f"{hub_id}{folder}{content}".encode(), usedforsecurity=False).hexdigest()
        model = self.models.setdefault(hub_id, HubModel({}, {}))
        model.commits[commit] = folder
        model.refs[ref] = commit
        model.is_gated = is_gated
        return commit

    def downloaded(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {
            path.rpartition("/")[2]
            for method, path in (one.split(" ", 1) for one in self.asked)
            if method == "GET" and ("/resolve/" in path or path.startswith("/lfs/"))
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        super().__init__(address, _Handler)
        self.hub = hub

    @property
    def url(self) -> str:
        """The address it listens on."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        try:
            if hub.status is not None:
                raise _Refused(hub.status, "")
            if path.startswith("/lfs/"):
                if token := self.headers.get("Authorization"):
                    hub.tokens_at_cdn.append(token)
                _, _, owner, model, commit, name = path.split("/", 5)
                self._file(hub.models[f"{owner}/{model}"].commits[commit] / name, {})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
                self._api(found[1], found[2] or "revision", found[3] or "main")
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(found[1], found[2], found[3])
            else:
                raise _Refused(404, "")
        except _Refused as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self._send(error.status, b"{}", headers | {"Content-Type": "application/json"})

    def _find(self, hub_id: str, revision: str) -> tuple[str, Path]:
        hub = self.server.hub
        model = hub.models.get(hub_id)
        if model is None:
            raise _Refused(401, "RepoNotFound")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if model.is_gated and token not in hub.tokens:
            raise _Refused(403 if token else 401, "GatedRepo")
        commit = model.refs.get(revision, revision)
        if commit not in model.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit, model.commits[commit]

    def _api(self, hub_id: str, what: str, revision: str) -> None:
        commit, folder = self._find(hub_id, revision)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if what == "tree":
            body: Any = [_entry(name, path) for name, path in zip(names, files, strict=True)]
        else:
            siblings = [{"rfilename": name} for name in names]
            body = {"id": hub_id, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, hub_id: str, revision: str, name: str) -> None:
        commit, folder = self._find(hub_id, revision)
        path = folder / name
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        elif path.suffix in LFS_SUFFIXES and self.server.hub.has_cdn:
            entry = _entry(name, path)
            headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            self._send(302, b"", headers | {"Location": f"{self.server.hub.cdn_url}/lfs/{hub_id}/{commit}/{name}"})
        else:
            self._file(path, headers | {"ETag": f'"{_entry(name, path)["oid"]}"'})

    def _file(self, path: Path, headers: dict[str, str]) -> None:
        body, status = path.read_bytes(), 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(found[1])
            headers |= {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
            body, status = body[begin:], 206
        cut = self.server.hub.cut_after.pop(path.name, None) if self.command == "GET" else None
        self._send(status, body, headers, cut=cut)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True


def _entry(name: str, path: Path) -> dict[str, Any]:
    """How the hub lists a file."""
    data = path.read_bytes()
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if path.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
