"""A stand-in of a Hugging Face hub's HTTP API, over real sockets: what huggingface_hub really asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secret-of-the-tests"
PART = 1000  # bytes of one part of a large upload
REGULAR = (".json", ".md", ".gitattributes")  # kept in git; everything else is large
REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "create": r"POST /api/repos/create",
    "info": rf"GET /api/models/{REPO}(/revision/main)?",
    "commits": rf"GET /api/models/{REPO}/commits/main",
    "tree": rf"GET /api/models/{REPO}/tree/(?P<rev>\w+)",
    "preupload": rf"POST /api/models/{REPO}/preupload/main",
    "batch": rf"POST /{REPO}\.git/info/lfs/objects/batch",
    "put": r"PUT /storage/(?P<oid>\w+)/(?P<part>\d+)",
    "complete": r"POST /storage/(?P<oid>\w+)",
    "verify": r"POST /verify",
    "commit": rf"POST /api/models/{REPO}/commit/main",
    "yaml": r"POST /api/validate-yaml",
    "whoami": r"GET /api/whoami-v2",
    "resolve": rf"GET /{REPO}/resolve/(?P<rev>\w+)/(?P<path>.+)",
}


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Hold:
    """A request that is stopped before it is done, or after, before it is answered."""

    def __init__(self, after: bool) -> None:
        self.after = after
        self.forgotten = False
        self.reached, self.released = threading.Event(), threading.Event()

    def forget(self) -> None:
        """Drop a request whose client is gone: it is not carried out and not answered."""
        self.forgotten = True
        self.released.set()

    def stop_here(self) -> None:
        """Wait until released."""
        self.reached.set()
        assert self.released.wait(100)
        if self.forgotten:
            raise ConnectionAbortedError


class FakeHub:
    """Repositories of one user, `me`: each a list of commits, oldest first; a commit is all files by path."""

    def __init__(self) -> None:
        self.token = TOKEN
        self.role = "write"
        self.repos: dict[str, list[dict[str, Any]]] = {}
        self.visibility: dict[str, str | None] = {}
        self.public: set[str] = set()  # repositories whose files need no token
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.seen: list[str] = []
        self.faults: dict[str, list[Any]] = {}
        self.lock = threading.Lock()
        hub = self

        class Bound(Handler):
            fake = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()

    def fault(self, kind: str, *faults: Any) -> None:
        """For the next of a kind: a status, (status, Retry-After), "drop", "lost", "hang" or a Hold."""
        self.faults.setdefault(kind, []).extend(faults)

    def hold(self, kind: str, *, after: bool = False) -> Hold:
        """Hold the next request of a kind."""
        hold = Hold(after)
        self.fault(kind, hold)
        return hold

    def commit(self, repo: str, title: str, files: dict[str, bytes]) -> str:
        """Add a commit as another client would."""
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.repos[repo].append({"id": oid, "title": title, "files": files})
        return oid

    def at(self, repo: str, revision: str) -> dict[str, bytes]:
        """Return the files of a revision."""
        commits = self.repos[repo]
        found = [one for one in commits if one["id"] == revision or revision == "main"]
        return dict(found[-1]["files"])

    # --- what is asked for ---

    def create(self, body: Any) -> Any:
        """Create a repository."""
        repo = f"{body.get('organization') or 'me'}/{body['name']}"
        if not repo.startswith("me/"):
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.url}/{repo}"
        if repo in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.repos[repo] = []
        self.visibility[repo] = body.get("visibility")
        self.commit(repo, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": url}

    def info(self, body: Any, repo: str) -> Any:
        """Return the newest revision and the files."""
        return {"id": repo, "sha": self.repos[repo][-1]["id"], "siblings": []}

    def commits(self, body: Any, repo: str) -> Any:
        """List the commits, newest first."""
        plain = {"authors": [{"user": "me"}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        return [plain | {"id": one["id"], "title": one["title"]} for one in reversed(self.repos[repo])]

    def tree(self, body: Any, repo: str, rev: str) -> Any:
        """List the files of a revision."""
        return [_entry(path, content) for path, content in sorted(self.at(repo, rev).items())]

    def preupload(self, body: Any, repo: str) -> Any:
        """Say which files are uploaded as large ones."""
        there = self.at(repo, "main")
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if file["path"].endswith(REGULAR) else "lfs",
                    "shouldIgnore": False,
                    "oid": _entry("", there[file["path"]])["oid"] if file["path"] in there else None,
                }
                for file in body["files"]
            ]
        }

    def batch(self, body: Any, repo: str) -> Any:
        """Return the upload addresses of large files."""
        return {"transfer": "multipart", "objects": [self._upload(one) for one in body["objects"]]}

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        oid, size = one["oid"], one["size"]
        if oid in self.large:
            return one
        upload: dict[str, Any] = {"href": f"{self.url}/storage/{oid}/1"}
        if size > PART:
            count = -(-size // PART)
            header = {str(number): f"{self.url}/storage/{oid}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{self.url}/storage/{oid}", "header": header | {"chunk_size": str(PART)}}
        return one | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}

    def put(self, body: bytes, oid: str, part: str) -> Any:
        """Store one part of a large file."""
        self.parts.setdefault(oid, {})[int(part)] = body
        if len(body) <= PART and hashlib.sha256(body).hexdigest() == oid:
            self.large[oid] = body
        return {}

    def complete(self, body: Any, oid: str) -> Any:
        """Join the parts of a large file."""
        assert [part["partNumber"] for part in body["parts"]] == sorted(self.parts[oid])
        whole = b"".join(content for _, content in sorted(self.parts[oid].items()))
        if hashlib.sha256(whole).hexdigest() != oid:
            raise Refused(400, "the parts are not the object")
        self.large[oid] = whole
        return {}

    def verify(self, body: Any) -> Any:
        """Check that a large file is stored whole."""
        if len(self.large.get(body["oid"], b"")) != body["size"]:
            raise Refused(404, "no such object")
        return {}

    def whoami(self, body: Any) -> Any:
        """Return whose token it is, as a hub does."""
        return {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": self.role}}}

    def do_commit(self, body: list[Any], repo: str) -> Any:
        """Commit files, if the parent is still the newest commit."""
        header, *operations = body
        with self.lock:
            if header["value"]["parentCommit"] != self.repos[repo][-1]["id"]:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = self.at(repo, "main")
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "lfsFile":
                    if value["oid"] not in self.large:
                        raise Refused(400, "LFS pointer pointed to a file that does not exist")
                    files[value["path"]] = self.large[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            oid = self.commit(repo, header["value"]["summary"], files)
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}

    def yaml(self, body: Any) -> Any:
        """Accept any model card."""
        return {"errors": [], "warnings": []}

    def resolve(self, body: Any, repo: str, rev: str, path: str) -> bytes:
        """Return the content of a file."""
        files = self.at(repo, rev)
        if path not in files:
            raise Refused(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=self.head(repo))
        return files[path]

    def head(self, repo: str) -> str:
        """Return the newest commit."""
        return str(self.repos[repo][-1]["id"])


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(REGULAR):
        return entry
    return entry | {
        "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    }


class Handler(BaseHTTPRequestHandler):
    """Handles requests; misbehaves if a fault is set for the operation."""

    protocol_version = "HTTP/1.1"
    fake: FakeHub

    def serve(self) -> None:
        """Answer one request."""
        body = self._body()
        path = self.path.partition("?")[0]
        command = "GET" if self.command == "HEAD" else self.command
        matches = {kind: re.fullmatch(route, f"{command} {path}") for kind, route in ROUTES.items()}
        kind, match = next(((kind, match) for kind, match in matches.items() if match), ("none", None))
        self.fake.seen.append(kind)
        planned = self.fake.faults.get(kind)
        fault = planned.pop(0) if planned else None
        try:
            if match is None:
                raise Refused(404, f"no such page: {self.command} {path}")
            self._misbehave(fault)
            answer = self._do(kind, body, match.groupdict())
            if fault == "lost":
                raise ConnectionAbortedError
            if isinstance(fault, Hold) and fault.after:
                fault.stop_here()
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            headers = {"ETag": f'"{_entry("", content)["oid"]}"'}
            if kind == "resolve" and match is not None:
                headers["X-Repo-Commit"] = self.fake.head(match["repo"])
            self._answer(200, content, headers)
        except Refused as refused:
            self._answer(
                refused.status,
                json.dumps({"error": str(refused)} | refused.headers).encode(),
                refused.headers,
            )

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _do(self, kind: str, body: bytes, names: dict[str, str]) -> Any:
        allowed = self.headers.get("Authorization") == f"Bearer {self.fake.token}"
        allowed |= kind == "resolve" and names["repo"] in self.fake.public
        if kind not in ("put", "complete") and not allowed:  # those have signed addresses
            raise Refused(401, "Invalid username or password.")
        if "repo" in names and names["repo"] not in self.fake.repos:
            raise Refused(404, "Repository not found", X_Error_Code="RepoNotFound")
        what: Callable[..., Any] = getattr(self.fake, "do_commit" if kind == "commit" else kind)
        if kind == "commit":
            return what([json.loads(line) for line in body.splitlines()], **names)
        return what(body if kind == "put" else json.loads(body or b"null"), **names)

    def _misbehave(self, fault: Any) -> None:
        if isinstance(fault, int):
            raise Refused(fault, "injected fault")
        if isinstance(fault, tuple):
            raise Refused(fault[0], "injected fault", Retry_After=str(fault[1]))
        if fault == "hang":
            threading.Event().wait(2)
        if fault in ("hang", "drop"):
            raise ConnectionAbortedError
        if isinstance(fault, Hold) and not fault.after:
            fault.stop_here()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        """Serve a connection; a client that goes away is no error."""
        try:
            super().handle()
        except ConnectionError:  # a fault that hangs up, or the client was killed
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
