"""A Hub on the loopback interface, for tests: in memory, one process, and with faults on demand.

It speaks the HTTP calls that the real client of `huggingface_hub` makes to create a repository, upload (regular files
and LFS), commit, list and download. Large files live under another host name (`localhost`), as they do on the Hub, so
that a test sees whether a token leaves with them.

```python
with LoopbackHub() as hub:
    api = HfApi(endpoint=hub.url, token=hub.token)            # HF_HUB_DISABLE_XET=1: Xet is not spoken here
    api.create_repo("tester/model")
    hub.inject("POST .*/commit/", status=500)                 # once: the request is refused
    hub.inject("POST .*/commit/", cut="answer")               # once: it is carried out, but the answer is lost
    hub.inject("PUT /lfs/", cut="request", times=2)           # twice: the connection ends inside the upload
    hub.inject("GET .*/resolve/", status=429, retry_after=1)
    hub.inject(".*", slow=0.1, times=None)                    # always: every answer waits
    api.upload_folder(repo_id="tester/model", folder_path="my-model")
    hub.files("tester/model")["config.json"]                  # bytes of the file on the branch main
    hub.commits("tester/model")                               # titles, oldest first
    hub.requests                                              # what came in, with status and token
```

`hub.users` has the tokens: one of `tester` that writes, one that only reads, and one of a `stranger`. `hub.namespaces`
says who may write where.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml
from loopback_http import Answer, Fault, Handler, Refused, Request, Server, answer_json, read


FIRST = "0" * 40
LFS_SUFFIXES = (".safetensors", ".bin", ".memory", ".png")
LFS_SIZE = 10 * 2**20


@dataclass(frozen=True)
class Blob:
    """A file as the Hub stores it."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with its own file: SHA-256 of a large file, git's hash of a regular one."""
        return sha256(self.content) if self.is_lfs else git_hash(self.content)

    def info(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": git_hash(self.content)}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, Blob]


@dataclass
class PullRequest:
    title: str
    author: str


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=lambda: {FIRST: Commit(FIRST, "initial commit", None, {})})
    refs: dict[str, str] = field(default_factory=lambda: {"main": FIRST})
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.find(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server and everything it stores. A context manager; `start` and `stop` do the same by hand."""

    def __init__(self, user: str = "tester") -> None:
        self.user = user
        self.token, self.read_token, self.stranger_token = "hf_loopback_write", "hf_loopback_read", "hf_loopback_other"
        # Token -> user and role.
        self.users = {
            self.token: (user, "write"),
            self.read_token: (user, "read"),
            self.stranger_token: ("stranger", "write"),
        }
        self.namespaces = {user: {user}, "stranger": {"stranger"}, "team": {user}}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def start(self) -> "LoopbackHub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url, self.storage_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        # Connections that a client keeps open end too.
        self.faults.insert(0, Fault(re.compile(""), None, None, "request", 0.0, 0, None))
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "LoopbackHub":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that shall talk to this Hub; they are read when `huggingface_hub` is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def inject(
        self,
        request: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        cut: str | None = None,
        slow: float = 0.0,
        skip: int = 0,
        times: int | None = 1,
    ) -> Fault:
        """
        Let something go wrong with the next request that matches. Of several faults the oldest that matches strikes.

        Args:
            request: regular expression for the start of `METHOD /path?query`.
            status: answer with this status instead of carrying the request out.
            retry_after: seconds for the header `Retry-After` beside `status`.
            cut: `"request"` ends the connection before the request was read whole; nothing is carried out.
                `"answer"` carries it out and ends the connection inside the answer.
            slow: seconds to wait before the answer.
            skip: how many matching requests pass first, not counting those that another fault struck.
            times: how many requests it strikes; `None` for all.
        """
        if cut not in (None, "request", "answer"):
            raise ValueError(f"`cut` is 'request' or 'answer', got {cut!r}.")
        fault = Fault(re.compile(request), status, retry_after, cut, slow, skip, times)
        self.faults.append(fault)
        return fault

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a repository's files."""
        return {path: blob.content for path, blob in self.repositories[name].find(revision).files.items()}

    def card(self, name: str, revision: str = "main") -> str:
        """Text of a repository's `README.md`."""
        return self.files(name, revision)["README.md"].decode()

    def commits(self, name: str, revision: str = "main") -> list[str]:
        """Titles of the commits, oldest first, without the empty one that a repository starts with."""
        return [commit.title for commit in self.repositories[name].history(revision)][-2::-1]

    # What is below runs in the server's threads, under the lock.

    def route(self, request: Request) -> Answer:
        self._identify(request)
        method, path = request.method, request.path
        if path == "/api/whoami-v2":
            return self._who_am_i(request)
        if path == "/api/validate-yaml":
            return self._validate_card(request.json()["content"])
        if path == "/api/repos/create":
            return self._create(request)
        if match := re.fullmatch(r"/lfs/(\w{64})", path):
            return self._store(match[1], request.body) if method == "PUT" else read(self.objects[match[1]], request)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repository(match[1], request)
            return self._lfs_batch(request.json()["objects"])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.*))?)?", path):
            repository = self._repository(match[1], request)
            call = getattr(self, f"_{method.lower()}_{match[2] or 'revision'}", None)
            if call is not None:
                return call(repository, match[3] or "main", request)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repository(match[1], request), match[2], unquote(match[3]), request)
        raise Refused(404, f"The loopback Hub does not know {method} {path}.")

    def _identify(self, request: Request) -> None:
        if request.token is not None:
            if request.token not in self.users:
                raise Refused(401, "Invalid credentials in Authorization header")
            request.user, request.role = self.users[request.token]

    def _may_write(self, name: str, request: Request) -> bool:
        return request.role == "write" and request.user in self.namespaces.get(name.split("/")[0], ())

    def _require_write(self, repository: Repository, request: Request, revision: str = "main") -> None:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        # Whoever opened a pull request may write to it.
        match = re.fullmatch(r"refs/pr/(\d+)", unquote(revision))
        opened = repository.pull_requests.get(int(match[1])) if match else None
        is_own = request.query.get("create_pr") == "1" or opened is not None and opened.author == request.user
        if not self._may_write(repository.name, request) and not (is_own and request.role == "write"):
            raise Refused(403, "you must use a write token to upload to a repository")

    def _repository(self, name: str, request: Request) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or repository.private and request.user not in self.namespaces[name.split("/")[0]]:
            raise Refused(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(unquote(revision))
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _who_am_i(self, request: Request) -> Answer:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        teams = [name for name, members in self.namespaces.items() if request.user in members - {name}]
        token = {"accessToken": {"role": request.role, "displayName": "loopback"}}
        orgs = [{"name": name} for name in teams]
        return answer_json({"type": "user", "name": request.user, "orgs": orgs, "auth": token})

    def _validate_card(self, content: str) -> Answer:
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return answer_json({"errors": [], "warnings": [] if data else [{"message": "empty or missing metadata"}]})

    def _create(self, request: Request) -> Answer:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        wanted = request.json()
        name = f"{wanted.get('organization') or request.user}/{wanted['name']}"
        if not self._may_write(name, request):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{name}"')
        known = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return answer_json({"error": "You already created this model repo", **known}, 409)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[name] = Repository(name, is_private)
        return answer_json(known)

    def _lfs_batch(self, wanted: list[dict[str, Any]]) -> Answer:
        objects = []
        for item in wanted:
            upload = {"upload": {"href": f"{self.storage_url}/lfs/{item['oid']}"}}
            todo = {} if item["oid"] in self.objects else {"actions": upload}
            objects.append({"oid": item["oid"], "size": item["size"], **todo})
        return answer_json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> Answer:
        if sha256(body) != oid:
            raise Refused(400, f"{len(body)} bytes do not hash to {oid}")
        self.objects[oid] = body
        return Answer(headers={"ETag": f'"{oid}"'})

    def _get_revision(self, repository: Repository, revision: str, request: Request) -> Answer:
        commit = self._commit(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        known = {"_id": repository.name, "id": repository.name, "modelId": repository.name, "sha": commit.oid}
        return answer_json({**known, "private": repository.private, "tags": [], "siblings": siblings})

    def _get_tree(self, repository: Repository, rest: str, request: Request) -> Answer:
        revision, _, folder = rest.partition("/")
        files, folder = self._commit(repository, revision).files, unquote(folder)
        return answer_json([blob.info(path) for path, blob in files.items() if path.startswith(folder)])

    def _get_refs(self, repository: Repository, rest: str, request: Request) -> Answer:
        refs = {
            kind: [
                {"name": name, "ref": name if is_request else f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in repository.refs.items()
                if name.startswith("refs/pr/") == is_request
            ]
            for kind, is_request in (("branches", False), ("pullRequests", True))
        }
        return answer_json({"converts": [], "tags": [], **refs})

    def _get_discussions(self, repository: Repository, rest: str, request: Request) -> Answer:
        known = {"createdAt": "2026-01-01T00:00:00.000Z", "status": "open", "isPullRequest": True}
        repo = {"name": repository.name, "type": "model"}
        found = [
            {"num": number, "title": opened.title, "author": {"name": opened.author}, "repo": repo, **known}
            for number, opened in repository.pull_requests.items()
            if request.query.get("author", opened.author) == opened.author
        ]
        return answer_json({"discussions": found, "count": len(found), "start": 0})

    def _post_branch(self, repository: Repository, rest: str, request: Request) -> Answer:
        self._require_write(repository, request)
        name = unquote(rest)
        if name in repository.refs:
            raise Refused(409, f"Reference already exists: {name}")
        repository.refs[name] = self._commit(repository, request.json().get("startingPoint", "main")).oid
        return answer_json({})

    def _post_preupload(self, repository: Repository, revision: str, request: Request) -> Answer:
        self._require_write(repository, request, revision)
        files = self._commit(repository, revision).files
        answers = []
        for entry in request.json()["files"]:
            path, is_binary = entry["path"], b"\0" in base64.b64decode(entry.get("sample", ""))
            is_lfs = path.endswith(LFS_SUFFIXES) or entry["size"] > LFS_SIZE or is_binary
            known = {"oid": files[path].oid} if path in files else {}
            mode = "lfs" if is_lfs and entry["size"] else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return answer_json({"files": answers})

    def _post_commit(self, repository: Repository, revision: str, request: Request) -> Answer:
        self._require_write(repository, request, revision)
        parent = self._commit(repository, revision)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", parent.oid) != parent.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        # All operations first: a commit is made whole or not at all.
        files = dict(parent.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        oid = hashlib.sha1(f"{parent.oid} {len(repository.commits)}".encode() + request.body).hexdigest()
        made = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repository.name}/commit/{oid}"}
        title, branch = header["value"]["summary"], unquote(revision)
        if request.query.get("create_pr") == "1":
            number = len(repository.pull_requests) + 1
            repository.pull_requests[number] = PullRequest(title, request.user)
            made["pullRequestUrl"] = f"{self.url}/{repository.name}/discussions/{number}"
            branch = f"refs/pr/{number}"
        repository.commits[oid] = Commit(oid, title, parent.oid, files)
        repository.refs[branch] = oid
        return answer_json(made)

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refused(400, f"LFS pointer of {path} points to an object that was not uploaded")
            files[path] = Blob(self.objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            files.pop(path, None)
        else:
            raise Refused(400, f"unknown operation {key}")

    def _resolve(self, repository: Repository, revision: str, path: str, request: Request) -> Answer:
        commit = self._commit(repository, revision)
        blob = commit.files.get(path)
        known = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **known)
        if not blob.is_lfs:
            answer = read(blob.content, request)
            answer.headers |= {**known, "ETag": f'"{blob.oid}"'}
            return answer
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return Answer(status=302, headers={**known, **linked, "Location": f"{self.storage_url}/lfs/{blob.oid}"})
