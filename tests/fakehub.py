"""A Hugging Face Hub on the loopback interface: enough of its HTTP interface to push a model, pull it, and be refused.

    with FakeHub() as hub:
        environment = hub.environment(cache_dir)     # of a fresh process: HF_ENDPOINT is read on import
        ...
        hub.files("tester/model")["config.json"]

Model repositories only; files travel inside the commit or as LFS objects, without Xet. It answers as the Hub does
where an answer decides what the client says: `X-Error-Code`, 401 for a wrong token and for anonymous readers of what
they may not know of, 403 for a gated repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """Commits in order, each a whole tree; `main` is the last."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, tree: dict[str, bytes], message: str) -> str:
        """Add a commit and return its id."""
        parent = self.commits[-1][0] if self.commits else ""
        oid = hashlib.sha1(f"{parent}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits.append((oid, tree))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and tree of a branch or commit."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class FakeHub:
    """The server; a context manager.

    Args:
        token: The one token that is valid.
        user: Whose token it is; the user may write to `user/...` alone.
    """

    def __init__(self, token: str = "hf_valid", user: str = "tester") -> None:
        self.token, self.user = token, user
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Bound(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_valid") -> dict[str, str]:
        """The variables with which a process talks to this Hub and no other, with caches of its own."""
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        mine = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return kept | mine | ({"HF_TOKEN": token} if token else {})

    def add(self, name: str, files: dict[str, bytes], **properties: Any) -> Repository:
        """Make a repository with one commit."""
        repository = self.repositories[name] = Repository(**properties)
        repository.commit(dict(files), "start")
        return repository

    def add_directory(self, name: str, directory: Path, **properties: Any) -> Repository:
        """Make a repository of a directory's files, those in its folders too."""
        files = [file for file in directory.rglob("*") if file.is_file()]
        content = {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}
        return self.add(name, content, **properties)

    def files(self, name: str) -> dict[str, bytes]:
        """The present files of a repository."""
        return self.repositories[name].commits[-1][1]


def blob_info(path: str, data: bytes) -> dict[str, Any]:
    """What the Hub tells of a file."""
    info: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LFS_SUFFIXES):
        info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return info


def git_oid(data: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request: a method for each route."""

    protocol_version = "HTTP/1.1"
    server_hub: FakeHub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET|HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def handle_request(self) -> None:
        """Find the route, check the token, answer."""
        parts = urlsplit(self.path)
        self.query, body = parse_qs(parts.query), self.read_body()
        hub = self.server_hub
        with hub.lock:
            hub.requests.append(f"{self.command} {parts.path}")
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.known = given == hub.token
            if given and not self.known:
                return self.error(401, "", "Invalid credentials in Authorization header")
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods.split("|"):
                    values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(body, **values)
            return self.error(404, "", f"the fake Hub has no {self.command} {parts.path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        """The body, chunked or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        """Send an error as the Hub words it."""
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def find(self, name: str, revision: str = "main") -> tuple[Repository, str, dict[str, bytes]] | None:
        """The repository at a revision, if this client may see it; otherwise the answer has been sent."""
        repository = self.server_hub.repositories.get(name)
        if repository is None or (repository.private and not self.known):
            self.error(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return None
        found = repository.at(revision)
        if found is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, *found

    def may_write(self, owner: str) -> bool:
        """Whether the token may write to this owner; otherwise the answer has been sent."""
        if not self.known:
            self.error(401, "", "Invalid username or password.")
        elif owner != self.server_hub.user:
            self.error(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        return self.known and owner == self.server_hub.user

    def who_am_i(self, body: bytes) -> None:
        if not self.known:
            return self.error(401, "", "Invalid username or password.")
        token = {"accessToken": {"role": "write", "displayName": "test"}}
        return self.answer(200, {"type": "user", "name": self.server_hub.user, "orgs": [], "auth": token})

    def validate_yaml(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        request, hub = json.loads(body), self.server_hub
        owner = request.get("organization") or hub.user
        name = f"{owner}/{request['name']}"
        if not self.may_write(owner):
            return None
        if name in hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
        hub.add(
            name,
            {".gitattributes": b""},
            private=request.get("visibility") == "private" or bool(request.get("private")),
        )
        return self.answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

    def lfs_batch(self, body: bytes, name: str) -> None:
        hub, objects = self.server_hub, []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.objects:
                upload = {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/verify", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "", "the contents do not fit the id")
        self.server_hub.objects[oid] = body
        return self.answer(200)

    def lfs_verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        whole = len(self.server_hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self.answer(200 if whole else 404, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        _, oid, tree = found
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": git_oid(tree[path])} if path in tree and mode == "regular" else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.answer(200, {"files": files, "commitOid": oid})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self.may_write(name.partition("/")[0]) or (found := self.find(name, revision)) is None:
            return
        repository, _, old = found
        tree, message = dict(old), ""
        for operation in map(json.loads, filter(None, body.split(b"\n"))):
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                tree[value["path"]] = self.server_hub.objects[value["oid"]]
            elif kind == "deletedFile":
                tree.pop(value["path"], None)
        oid = repository.commit(tree, message)
        self.answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server_hub.url}/{name}/commit/{oid}"}
        )

    def tree(self, body: bytes, name: str, revision: str, folder: str = "") -> None:
        if (found := self.find(name, revision)) is None:
            return
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        self.answer(200, [blob_info(path, data) for path, data in sorted(found[2].items()) if path.startswith(prefix)])

    def model_info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (found := self.find(name, revision)) is None:
            return
        repository, oid, tree = found
        state = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        counts = {"tags": [], "downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE}
        siblings = [{"rfilename": path} for path in tree]
        self.answer(
            200, {"_id": name, "id": name, "modelId": name, "sha": oid, "siblings": siblings, **state, **counts}
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        repository, oid, tree = found
        if repository.gated:
            text = (
                f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
            )
            return self.error(403 if self.known else 401, "GatedRepo", text)
        if path not in tree:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
        return self.send_file(tree[path], path, oid)

    def send_file(self, data: bytes, path: str, oid: str) -> None:
        """A file or the asked range of it."""
        lfs = path.endswith(LFS_SUFFIXES)
        tag = hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "GET" and wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, data[first : last + 1], headers)
        return self.answer(200, data, headers)
