"""A Hugging Face hub on this machine: the part of its HTTP API that downloads and commits of huggingface_hub use.

Tests point ``HF_ENDPOINT`` at its address. Uploads need ``TOKEN``.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
# Files that the hub stores as LFS objects.
LARGE = (".safetensors", ".onnx", ".bin", ".npz", ".png")


@dataclass
class Repository:
    """``branches``: name -> commit; ``commits``: commit -> files by name."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class FakeHub:
    """A server on a free port, with its repositories by name and the requests that it got.

    ``delay``: seconds for which it keeps the next request waiting.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.delay = 0.0
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, name: str, folder: Path, **how: bool) -> Repository:
        """Add a repository that holds a folder's files."""
        self.repositories[name] = Repository(**how)
        self.repositories[name].commit("main", {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
        return self.repositories[name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("Content_Length", str(len(body)))
        for name, value in {**headers, "Content_Length": length}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str = "") -> None:
        self._answer(
            status, json.dumps({"error": message or code}).encode(), X_Error_Code=code, X_Error_Message=message
        )

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _handle(self) -> None:
        delay, self.state.delay = self.state.delay, 0.0
        time.sleep(delay)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.state.requests.append(f"{self.command} {urlsplit(self.path).path}")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            self.state.objects[parts[1]] = body
            self._answer(200)
        elif len(parts) > 2 and parts[1].endswith(".git"):
            self._batch(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], body)
        else:
            self._model("/".join(parts[:2]), parts[2:], body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if not self._authorised:
            return self._error(401, "", "Invalid username or password.")
        if request.get("organization") == "others":
            return self._error(403, "", "You don't have the rights to create a model under this namespace")
        url = json.dumps({"url": f"{self.state.address}/{name}"}).encode()
        if name in self.state.repositories:
            return self._answer(409, url)
        made = self.state.repositories[name] = Repository(
            bool(request.get("private")) or request.get("visibility") == "private"
        )
        made.commit("main", {".gitattributes": b""})
        return self._answer(200, url, Content_Type="application/json")

    def _batch(self, request: dict) -> None:
        def upload(item: dict) -> dict:
            return {**item, "actions": {"upload": {"href": f"{self.state.address}/lfs/{item['oid']}", "header": {}}}}

        self._json({"transfer": "basic", "objects": [upload(item) for item in request["objects"]]})

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and not self._authorised):
            return self._error(401 if not self._authorised else 404, "RepoNotFound", "Repository not found")
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if what == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            return self._json({})
        if what in ("preupload", "commit") and not self._authorised:
            return self._error(401, "", "Invalid username or password.")
        found = repository.files(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if what == "resolve":
            return self._resolve(repository, sha, files, "/".join(rest[2:]))
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": sha, "private": repository.private, "gated": repository.gated}
            return self._json({**facts, "siblings": siblings, "tags": [], "downloads": 0})
        if what == "tree":
            return self._json([_entry(path, data) for path, data in files.items()])
        if what == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in wanted}
            return self._json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if what == "commit":
            return self._commit(repository, name, revision, files, body)
        return self._error(404, "", f"the fake hub has no {what}")

    def _resolve(self, repository: Repository, sha: str, files: dict[str, bytes], path: str) -> None:
        if repository.gated and not self._authorised:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        data = files[path]
        facts = {"X_Repo_Commit": sha, "ETag": f'"{_etag(path, data)}"', "X_Linked_Size": str(len(data))}
        return self._answer(200, data, **facts, Content_Type="application/octet-stream")

    def _commit(self, repository: Repository, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        new = dict(files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.state.objects[value["oid"]]
                if hashlib.sha256(data).hexdigest() != value["oid"]:
                    return self._error(400, "", "the object has another sha256")
                new[value["path"]] = data
        sha = repository.commit(branch, new)
        url = f"{self.state.address}/{name}/commit/{sha}"
        return self._json({"commitUrl": url, "commitOid": sha, "hookOutput": "", "success": True})


def _etag(path: str, data: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"lfs": {"oid": _etag(path, data), "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else {}
    return {"type": "file", "path": path, "oid": blob, "size": len(data), **lfs}
