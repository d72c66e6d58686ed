"""The real client of `huggingface_hub` against the loopback Hub: what it stores, whom it refuses, how it fails."""

import os
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "tester/model"


@pytest.fixture
def api(online) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    (path / "model.safetensors").write_bytes(os.urandom(300_000))
    (path / "sub" / "a file.txt").write_text("text")
    (path / "empty.txt").write_text("")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_goes_up_and_comes_back(api, online, folder):
    api.create_repo(REPO, private=True)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert first.oid == again.oid and len(online.commits(REPO)) == 1
    assert online.files(REPO) == contents(folder) == contents(Path(snapshot_download(REPO)))
    assert {file.path for file in api.list_repo_tree(REPO, recursive=True) if file.lfs} == {"model.safetensors"}
    # Large files lie elsewhere, and no token goes there.
    assert {request.host.split(":")[0] for request in online.requests} == {"127.0.0.1", "localhost"}
    assert not [request for request in online.requests if request.token and request.host.startswith("localhost")]


def test_branches_pull_requests_and_deletion(api, online):
    api.create_repo(REPO)
    api.create_branch(REPO, branch="v1")
    add = [CommitOperationAdd("x.txt", b"1")]
    api.create_commit(REPO, add, commit_message="to v1", revision="v1")
    assert not online.files(REPO) and online.files(REPO, "v1") == {"x.txt": b"1"}
    stranger = HfApi(token=online.stranger_token)
    opened = stranger.create_commit(REPO, [CommitOperationAdd("y.txt", b"2")], commit_message="y", create_pr=True)
    assert opened.pr_num == 1 and not online.files(REPO) and online.files(REPO, "refs/pr/1") == {"y.txt": b"2"}
    [known] = api.get_repo_discussions(REPO, author="stranger")
    assert (known.title, known.num, known.status) == ("y", 1, "open")
    stranger.create_commit(REPO, [CommitOperationDelete("y.txt")], commit_message="no y", revision="refs/pr/1")
    assert online.files(REPO, "refs/pr/1") == {} and online.commits(REPO, "refs/pr/1") == ["y", "no y"]
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "v1"} and refs.pull_requests[0].ref == "refs/pr/1"


def test_who_is_refused(api, online):
    assert api.whoami()["name"] == "tester"
    api.create_repo(REPO, private=True)
    add = [CommitOperationAdd("x.txt", b"1")]
    for token, error in {
        online.read_token: HfHubHTTPError,
        online.stranger_token: RepositoryNotFoundError,
        False: RepositoryNotFoundError,
        "hf_nonsense": HfHubHTTPError,
    }.items():
        with pytest.raises(error):
            api.create_commit(REPO, add, commit_message="x", token=token)
    for token, name in ((online.token, "stranger/model"), (online.read_token, REPO), (online.token, REPO)):
        with pytest.raises(HfHubHTTPError):
            api.create_repo(name, token=token)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nothing.txt")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.create_commit(REPO, [CommitOperationAdd("README.md", b"---\na: [\n---\n")], commit_message="x")
    assert online.commits(REPO) == []


def test_a_commit_is_whole_or_nothing(api, online):
    api.create_repo(REPO)
    big = CommitOperationAdd("b.bin", b"\0" * 10)
    online.inject("PUT /lfs/", status=400)
    with pytest.raises(RuntimeError):
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"1"), big], commit_message="x")
    assert online.commits(REPO) == [] and online.files(REPO) == {}
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"1")], commit_message="x", parent_commit="1" * 40)
    assert online.files(REPO) == {}


def test_faults_strike_once_and_the_client_survives_them(api, online, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    api.create_repo(REPO)
    faults = [
        online.inject("POST .*/preupload/", status=429, retry_after=7),
        online.inject("POST .*/batch", status=500),
        online.inject("PUT /lfs/", cut="request"),
        online.inject("PUT /lfs/", cut="answer"),
        online.inject("GET /lfs/", cut="answer"),
        online.inject("GET .*/resolve/", slow=0.05, times=2),
    ]
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert 8.0 in online.waits  # the client adds a second to what it was told
    assert contents(Path(snapshot_download(REPO))) == online.files(REPO) == contents(folder)
    assert [fault.times for fault in faults] == [0] * len(faults)
    assert len(online.commits(REPO)) == 1
    # What was cut off comes in two parts.
    assert "bytes=150000-" in [request.headers.get("Range") for request in online.requests]


def test_a_commit_whose_answer_is_lost(api, online):
    api.create_repo(REPO)
    online.inject("POST .*/commit/", cut="answer")
    with pytest.raises(Exception, match="connection"):
        api.create_commit(REPO, [CommitOperationAdd("x.txt", b"1")], commit_message="x")
    assert online.commits(REPO) == ["x"]
    api.create_commit(REPO, [CommitOperationAdd("x.txt", b"1")], commit_message="x")
    assert online.commits(REPO) == ["x"]
