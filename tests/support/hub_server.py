"""A server on loopback that speaks the Hub's protocol, as far as huggingface_hub, transformers and PEFT use it.

    with HubServer() as hub:
        hub.add_repo("me/base", {"config.json": b"..."})
        hub.fail("PUT", "/lfs/me/adapter/", 503)  # all of them from now on; hub.fail(..., times=1) for the next one
        subprocess.run(..., env=hub.environment(home))
        hub.repos["me/adapter"].branches["main"], hub.requests

Point a process at it by the environment: huggingface_hub reads its endpoint when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

TOKEN, USER = "hf_test", "me"
#: What a failure rule may do beside answering with a status.
DROP, DROP_AFTER, HANG = "drop the connection", "do it, and drop the connection", "never answer"
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class Commit:
    """A commit, with all files as they are after it."""

    branch: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository.

    Attributes:
        branches: the files of each branch.
        commits: those that were made through the server.
        lfs: contents of large files that were uploaded, by their SHA-256.
    """

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": dict(ATTRIBUTES)})
    commits: list[Commit] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def sha(self, branch: str) -> str:
        files = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.branches[branch].items())
        return hashlib.sha1(repr((branch, files)).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int


@dataclass
class Failure:
    method: str
    pattern: str
    action: int | str
    times: int | None


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """The server.

    Attributes:
        repos: repositories by id.
        requests: all that was asked, in the order of the answers.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables of a process that is to use this server, with `home` as its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    def add_repo(self, repo_id: str, files: dict[str, bytes]) -> None:
        self.repos[repo_id] = Repo(branches={"main": {**ATTRIBUTES, **files}})

    def fail(self, method: str, pattern: str, action: int | str, times: int | None = None) -> None:
        """From now on answer requests with a status, or DROP, DROP_AFTER or HANG.

        Args:
            pattern: is searched for in path and body.
            times: how often; None for ever (until `failures` is cleared).
        """
        with self.lock:
            self.failures.append(Failure(method, pattern, action, times))

    def failure_of(self, method: str, text: str) -> int | str | None:
        with self.lock:
            for rule in self.failures:
                if rule.method == method and rule.times != 0 and re.search(rule.pattern, text):
                    rule.times = None if rule.times is None else rule.times - 1
                    return rule.action
        return None

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of a kind."""
        with self.lock:
            return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def wait_for(self, method: str, pattern: str, seconds: float = 120) -> None:
        """Wait until there was such a request (one that hangs counts when it begins)."""
        end = time.monotonic() + seconds
        while not self.asked(method, pattern):
            assert time.monotonic() < end, f"no {method} {pattern} within {seconds} s"
            time.sleep(0.05)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        action = self.hub.failure_of(self.command, f"{path} {body[:200].decode(errors='replace')}")
        if action in (DROP, HANG):
            self._record(path, 0)
            if action == HANG:
                self.hub.stopping.wait()
            self.close_connection = True
            return
        try:
            if isinstance(action, int):
                raise HubError(action, message="told to fail")
            self._check_token(path)
            with self.hub.lock:
                status, headers, answer = self._route(path, body)
        except HubError as error:
            answer = json.dumps(error.body or {"error": error.message}).encode()
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            status = error.status
        self._record(path, status)
        if action == DROP_AFTER:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _record(self, path: str, status: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, status))

    def _check_token(self, path: str) -> None:
        given = self.headers.get("Authorization")
        needed = path.startswith(("/api/repos", "/api/whoami")) or "/commit/" in path or "/preupload/" in path
        if given not in (None, f"Bearer {TOKEN}") or (needed and given is None):
            raise HubError(401, message="Invalid credentials in Authorization header")

    # -- routes -----------------------------------------------------------------------------------------------------

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        routes: dict[tuple[str, str], Callable[..., Any]] = {
            ("GET", "/api/whoami-v2"): lambda body: {"type": "user", "name": USER, "orgs": []},
            ("POST", "/api/validate-yaml"): self._validate,
            ("POST", "/api/repos/create"): self._create,
            ("DELETE", "/api/repos/delete"): self._delete,
            ("POST", r"/api/models/(.+)/preupload/(.+)"): self._preupload,
            ("POST", r"/api/models/(.+)/commit/(.+)"): self._commit,
            ("POST", r"/api/models/(.+)/branch/(.+)"): self._branch,
            ("POST", r"/(.+)\.git/info/lfs/objects/batch"): self._batch,
            ("PUT", r"/lfs/(.+)/([^/]+)"): self._store,
            ("GET", r"/api/models/(.+)/tree/([^/]+)(?:/.*)?"): self._tree,
            ("GET", r"/api/models/(.+)/revision/(.+)"): self._info,
            ("GET", r"/api/models/(.+)"): self._info,
        }
        for (method, pattern), handler in routes.items():
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer = json.dumps(handler(body, *match.groups())).encode()
                return 200, {"Content-Type": "application/json"}, answer
        if self.command in ("GET", "HEAD") and (match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)):
            return self._resolve(*match.groups())
        raise HubError(404, message=f"no such route: {self.command} {path}")

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.hub.repos[repo_id]

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        for branch, files in repo.branches.items():
            if revision in (branch, repo.sha(branch)):
                return repo.sha(branch), files
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        header = re.match(r"---\n(.*?)\n---", content, re.S)
        data = yaml.safe_load(header[1]) if header else {}
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            try:
                validate_repo_id(base)
            except HFValidationError:
                message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
                raise HubError(400, message=message, body={"errors": [{"message": message}], "warnings": []}) from None
        return {"errors": [], "warnings": []}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        if owner != USER:
            raise HubError(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            message = "You already created this model repo"
            raise HubError(409, message=message, body={"error": message, "url": f"{self.hub.url}/{repo_id}"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[repo_id] = Repo(private=private)
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def _delete(self, body: bytes) -> Any:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self._repo(repo_id)
        del self.hub.repos[repo_id]
        return {}

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> Any:
        self._files(repo_id, revision)
        large = (".safetensors", ".bin", ".png", ".pt")
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return {"files": rows}

    def _batch(self, body: bytes, repo_id: str) -> Any:
        known, rows = self._repo(repo_id).lfs, []
        for entry in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{entry['oid']}"}}}
            rows.append({**entry, **({} if entry["oid"] in known else upload)})
        return {"transfer": "basic", "objects": rows}

    def _store(self, body: bytes, repo_id: str, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="content does not match its SHA-256")
        self._repo(repo_id).lfs[oid] = body
        return {}

    def _commit(self, body: bytes, repo_id: str, revision: str) -> Any:
        _, files = self._files(repo_id, revision)
        repo, target = self._repo(repo_id), revision
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        changed = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise HubError(400, message=f"{value['path']}: its content was not uploaded")
                changed[value["path"]] = repo.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del changed[value["path"]]
        asks_review = "create_pr" in parse_qs(urlsplit(self.path).query)
        if asks_review:
            target = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.branches) + 1}"
        repo.branches[target] = changed
        repo.commits.append(Commit(target, lines[0]["value"]["summary"], changed))
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.sha(target)}", "commitOid": repo.sha(target)}
        if asks_review:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{target.rpartition('/')[2]}"
        return answer

    def _branch(self, body: bytes, repo_id: str, branch: str) -> Any:
        repo = self._repo(repo_id)
        if branch in repo.branches:
            raise HubError(409, message="Reference already exists")
        repo.branches[branch] = dict(repo.branches["main"])
        return {}

    def _info(self, body: bytes, repo_id: str, revision: str = "main") -> Any:
        sha, files = self._files(repo_id, revision)
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo_id, "sha": sha, "private": self._repo(repo_id).private, "tags": [], "siblings": siblings}

    def _tree(self, body: bytes, repo_id: str, revision: str) -> Any:
        _, files = self._files(repo_id, revision)
        return [
            {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
            for name, data in files.items()
        ]

    def _resolve(self, repo_id: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        sha, files = self._files(repo_id, revision)
        if name not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(files[name]).hexdigest()
        return (
            200,
            {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"},
            files[name],
        )
