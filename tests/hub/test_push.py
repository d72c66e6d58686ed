"""`hf-memory push` and `push_to_hub` against the loopback Hub: one commit, whatever goes wrong on the way."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import LlamaConfig
from typer.testing import CliRunner

from hf_memory.cli import app
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.hub import cards, push
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


REPO = "tester/model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "my-titans"
    torch.manual_seed(0)
    random_model(tiny_config("titans", vocab_size=300)).save_pretrained(folder)
    byte_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "my-titans")


@pytest.fixture(autouse=True)
def waits(online, monkeypatch) -> list[float]:
    """Seconds that a push would have waited, beside those of the client."""
    monkeypatch.setattr(push, "time", SimpleNamespace(sleep=online.waits.append))
    return online.waits


@pytest.fixture
def quick_cards(monkeypatch) -> None:
    """Cards without the table that takes a model on the meta device, where the card is not what is tested."""
    monkeypatch.setattr(cards, "_states", lambda config, dtype: [])


def run(*arguments: object):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_arrives_with_code_and_card(online, folder):
    for name in ("training_args.bin", "checkpoint-7/optimizer.pt", "__pycache__/x.pyc", ".cache/x", "sub/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    before = contents(folder)
    result = run(folder, REPO)
    assert result.exit_code == 0, result.output
    assert contents(folder) == before
    assert result.stdout.startswith(f"{online.url}/{REPO}/commit/") and result.stdout.count("\n") == 1
    assert "Left out (pickles and working state): __pycache__/x.pyc, checkpoint-7/optimizer.pt, training_args.bin" in (
        " ".join(result.stderr.split())
    )
    files = online.files(REPO)
    assert {name: content for name, content in files.items() if name in before} == {
        name: content for name, content in before.items() if name in files
    } | {"config.json": files["config.json"]}
    assert files.keys() - before.keys() == {name for name in files if name.endswith(".py")} | {"README.md"}
    assert "sub/notes.txt" in files and not [name for name in files if "optimizer" in name or name.startswith(".")]
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_titans.TitansForCausalLM"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and "# my-titans" in card.text and "trust_remote_code" in card.text

    again = run(folder, "model")
    assert again.exit_code == 0 and "no commit was made" in again.stderr
    assert online.commits(REPO) == ["Upload my-titans with hf-memory"]


FAULTS = {
    "an error of the server at every call": [
        {"request": call, "status": 500}
        for call in (
            "GET /api/whoami",
            "POST /api/repos/create",
            "POST /api/validate-yaml",
            "POST .*/preupload/",
            "POST .*/batch",
            "PUT /lfs/",
            "POST .*/commit/",
        )
    ],
    "too many requests": [{"request": "POST .*/commit/", "status": 429, "retry_after": 3, "times": 2}],
    "cut inside the upload": [{"request": "PUT /lfs/", "cut": "request", "times": 3}],
    "cut before the commit": [{"request": "POST .*/commit/", "cut": "request", "times": 2}],
    "the answer to the commit is lost": [{"request": "POST .*/commit/", "cut": "answer"}],
    "the answer to the creation is lost": [{"request": "POST /api/repos/create", "cut": "answer"}],
    "slow": [{"request": ".*", "slow": 0.01, "times": None}],
}


@pytest.mark.parametrize("target", ["branch", "pull request"])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_survived_and_nothing_is_doubled(name, target, online, folder, quick_cards):
    if target == "pull request":
        HfApi().create_repo(REPO)
    faults = [online.inject(**fault) for fault in FAULTS[name]]
    result = run(folder, REPO, *(["--create-pr"] if target == "pull request" else []))
    assert result.exit_code == 0, result.output
    if target == "branch":
        assert len(online.commits(REPO)) == 1
    else:
        assert result.stdout.strip() == f"{online.url}/{REPO}/discussions/1"
        assert len(online.repositories[REPO].pull_requests) == 1 and online.commits(REPO) == []
    files = online.files(REPO, "main" if target == "branch" else "refs/pr/1")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "tokenizer.json"} <= files.keys()
    struck = [fault for fault in faults if fault.times == 0]
    assert struck or name == "slow" or target == "pull request"
    if name == "too many requests":
        assert online.waits.count(3) == 2


def test_what_broke_off_goes_on(online, folder, quick_cards):
    fault = online.inject("POST .*/commit/", cut="request", times=None)
    result = run(folder, REPO, "--private")
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(
        "Error: The Hub cannot be reached, after 5 attempts: run it again to go on"
    )
    assert online.commits(REPO) == [] and len(online.objects) == 1
    fault.times = 0
    online.requests.clear()
    assert run(folder, REPO, "--private").exit_code == 0
    assert len(online.commits(REPO)) == 1 and online.repositories[REPO].private
    assert not [request for request in online.requests if request.method == "PUT"]


def test_branches_and_pull_requests(online, folder, quick_cards):
    assert run(folder, REPO, "--revision", "v1", "--message", "first").exit_code == 0
    assert online.commits(REPO, "v1") == ["first"] and online.files(REPO) == {}
    (folder / "notes.txt").write_text("1")
    assert run(folder, REPO, "--create-pr").stdout == f"{online.url}/{REPO}/discussions/1\n"
    (folder / "notes.txt").write_text("2")
    assert run(folder, REPO, "--create-pr").stdout == f"{online.url}/{REPO}/discussions/1\n"
    assert online.files(REPO, "refs/pr/1")["notes.txt"] == b"2" and len(online.repositories[REPO].pull_requests) == 1
    assert run(folder, REPO, "--create-pr", "--message", "other").stdout == f"{online.url}/{REPO}/discussions/2\n"


def test_what_an_earlier_version_left_goes_and_what_people_wrote_stays(online, folder, quick_cards):
    api = HfApi()
    api.create_repo(REPO)
    theirs = {"README.md": b"---\nlicense: mit\n---\nby hand\n", "notes.md": b"1", "handler.py": b"2"}
    left = {"model-00001-of-00002.safetensors": b"\0", "model.safetensors.index.json": b"{}", "hf_memory_old.py": b""}
    for name, content in (theirs | left).items():
        api.upload_file(repo_id=REPO, path_in_repo=name, path_or_fileobj=content)
    result = run(folder, REPO)
    assert "written by hand, and stays" in result.stderr
    files = online.files(REPO)
    assert not files.keys() & left.keys() and {name: files[name] for name in theirs} == theirs
    # A card of one's own in the folder is what one wants to push.
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert run(folder, REPO).exit_code == 0 and b"mine" in online.files(REPO)["README.md"]


def damage(folder: Path, kind: str) -> None:
    if kind == "no weights":
        (folder / "model.safetensors").rename(folder / "model.bin")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "torn config":
        (folder / "config.json").write_text("{")
    elif kind == "llama":
        LlamaConfig().save_pretrained(folder)
    elif kind == "bad card":
        (folder / "README.md").write_text("---\na: [\n---\n")


@pytest.mark.parametrize(
    "arguments, kind, sentence",
    [
        ("FOLDER tester/model/x", "", "is no name for a repository: give NAME, USER/NAME or ORGANISATION/NAME"),
        ("FOLDER/missing model", "", "There is no folder"),
        ("FOLDER model", "no config", "holds no config.json"),
        ("FOLDER model", "torn config", "is not a valid JSON file"),
        ("FOLDER model", "no weights", "holds no weights in safetensors"),
        ("FOLDER model", "llama", "needs nothing of hf-memory: `hf upload REPO"),
        ("FOLDER model", "bad card", "The header of README.md is not accepted"),
        ("FOLDER stranger/model", "", "The token of 'tester' may not write to"),
        ("FOLDER stranger/theirs", "", "or pass --create-pr to propose the change"),
        ("FOLDER model --create-pr", "", "There is no repository 'tester/model' that this token can see"),
        ("FOLDER model --create-pr --revision v1", "", "drop one of --create-pr and --revision"),
        ("FOLDER model --revision refs/pr/7", "", "There is no repository 'tester/model'"),
        ("FOLDER llama", "", "holds a llama model, and this is a titans model: choose another name, or pass --force"),
        ("FOLDER llama --private", "", "is there already and public"),
        ("FOLDER model", "read token", "may not write to"),
        ("FOLDER model", "wrong token", "The token is not valid: run `hf auth login`"),
        ("FOLDER model", "no token", "Nobody is logged in: run `hf auth login`"),
        ("FOLDER model", "offline", "switched off by HF_HUB_OFFLINE"),
        ("FOLDER model", "no server", "The Hub cannot be reached, after 5 attempts"),
        ("FOLDER model", "out of order", "The Hub answered 503, after 5 attempts"),
        ("FOLDER model", "too large", "The Hub refused (413): injected"),
    ],
)
def test_what_is_refused_is_one_sentence(arguments, kind, sentence, online, folder, quick_cards, monkeypatch):
    HfApi(token=online.stranger_token).create_repo("stranger/theirs")
    HfApi().create_repo("tester/llama")
    HfApi().upload_file(repo_id="tester/llama", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "llama"}')
    damage(folder, kind)
    tokens = {"read token": online.read_token, "wrong token": "hf_secret_of_somebody", "no token": None}
    if kind in tokens:
        monkeypatch.delenv("HF_TOKEN")
        if tokens[kind]:
            monkeypatch.setenv("HF_TOKEN", tokens[kind])
    if kind == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if kind == "no server":
        online.inject("", cut="request", times=None)
    if kind == "out of order":
        online.inject("", status=503, times=None)
    if kind == "too large":
        online.inject("POST .*/commit/", status=413)
    before, commits = contents(folder), {name: len(online.commits(name)) for name in online.repositories}
    result = run(*arguments.replace("FOLDER", str(folder)).split())
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("Error: ") :]
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in result.output, result.stderr
    for token in (*online.users, "hf_secret_of_somebody"):
        assert token not in result.output
    assert contents(folder) == before
    assert all(len(online.commits(name)) == commits.get(name, 0) for name in online.repositories)


def hybrid() -> MemoryHybridConfig:
    teacher = tiny_config("llama", num_hidden_layers=2, pad_token_id=None)
    return MemoryHybridConfig.from_teacher(teacher, memory_layers=[1], memory={"memory_depth": 1})


@pytest.mark.parametrize("make", [lambda: tiny_config("titans"), hybrid], ids=["titans", "hybrid"])
def test_push_to_hub_carries_code_and_card(make, online, quick_cards, capfd):
    model = random_model(make())
    for _ in range(2):
        url = model.push_to_hub("model", private=True, tags=["mine"], commit_message="up")
    assert url.startswith(online.url) and online.commits(REPO) == ["up"] and online.repositories[REPO].private
    files = online.files(REPO)
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"].endswith(type(model).__name__)
    assert "hf_memory_modeling.py" in files and not [name for name in files if "hub" in name]
    assert "mine" in ModelCard(files["README.md"].decode()).data.tags
    printed = "".join(capfd.readouterr())
    assert online.token not in printed


def test_no_token_in_anything_that_was_pushed(online, folder):
    assert run(folder, REPO).exit_code == 0
    assert not [name for name, content in online.files(REPO).items() if online.token.encode() in content]
    assert {r.host.split(":")[0] for r in online.requests if r.token} == {"127.0.0.1"}
