"""A model folder on the Hub: all of its files in one commit, which can be tried again until it is there.

What was uploaded before an interruption is not uploaded again, a commit whose answer got lost is not made twice, and
files on this machine are never changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, get_token, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

import hf_memory
from hf_memory._cli.state_size import readable_size
from hf_memory.hub import cards
from hf_memory.hub.remote_code import EXPORTABLE, export_remote_code


CARD = "README.md"
# Pickles run code when they are loaded, the others are somebody's working state.
LEFT_OUT = ("*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.bin", "checkpoint-*/*", "*.pyc", ".*", "*/.*")
# What another version of the model may have left in the repository, and would be loaded beside or before the new one.
STALE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|hf_memory_\w+\.py")
TRIES = 5
# Times outs, too many requests, and whatever is the server's own fault.
_PASSING = (408, 429, 500, 502, 503, 504)


class PushError(ValueError):
    """A sentence for the user: what the Hub did not accept, and what to do."""


@dataclass(frozen=True)
class Pushed:
    """
    Where a model is now.

    Args:
        repo: `namespace/name`.
        url: page of the commit or of the pull request.
        commit: its id.
        is_new: whether anything had changed since the last commit.
    """

    repo: str
    url: str
    commit: str
    is_new: bool


def stage_folder(
    folder: Path | str,
    scratch: Path | str,
    *,
    code: bool = True,
    write_card: Callable[[Path], Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """
    What of a model folder goes to the Hub, as links in another folder, with code and a card where they are missing.

    Args:
        folder: of a saved model of this library.
        scratch: an empty folder.
        code: whether to add the code by which the model loads where hf_memory is not installed. Code that is there
            stays as it is.
        write_card: fills `README.md` of the folder that it is given. It is called where there is no card, and where
            the card was filled before. Default: a card from the configuration alone.
        say: is told what stays behind.

    Returns:
        The folder with the links; it bears the name of the first one.

    Raises:
        PushError: for a folder without a model of this library.
    """
    folder = Path(folder)
    config = _read_config(folder)
    stage = Path(scratch) / folder.resolve().name
    stage.mkdir()
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sent = list(filter_repo_objects(found, ignore_patterns=list(LEFT_OUT)))
    if not any(name.endswith(".safetensors") for name in sent):
        raise PushError(f"The folder {str(folder)!r} holds no weights in safetensors: save the model there first.")
    behind = [name for name in found if name not in sent and not any(p.startswith(".") for p in Path(name).parts)]
    if behind:
        say(f"Left out (pickles and working state): {', '.join(behind)}")
    for name in sent:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        _link(found[name], stage / name)
    if code and not json.loads((stage / CONFIG_NAME).read_text(encoding="utf-8")).get("auto_map"):
        export_remote_code(config, stage)
    if not (stage / CARD).exists() or cards.is_ours(stage / CARD):
        (write_card or (lambda path: cards.write_card(path, config, metadata=cards.read_metadata(path / CARD))))(stage)
    return stage


def push_folder(
    stage: Path | str,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    description: str | None = None,
    replace: bool = False,
    token: str | bool | None = None,
    card: Callable[[str], str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """
    Make a commit of all files of a folder, and create the repository or the branch if it is not there.

    Weights and code of an earlier version that the folder does not have are removed in the same commit. A card that
    somebody wrote by hand in the repository stays, if the one in the folder was filled. A folder without a model is
    added to what is there.

    Args:
        stage: see `stage_folder`; or a folder without a configuration.
        repo: `namespace/name`; a name alone belongs to the user of the token.
        private: of a new repository. Default: as the Hub decides.
        revision: branch. Default: the main one.
        create_pr: open a pull request; one of the same title that is open is brought up to date.
        message: of the commit. Default: `Upload <name of the folder> with hf-memory`.
        description: of the commit.
        replace: whether the repository may hold a model of another type.
        token: default: the one that `hf auth login` or `HF_TOKEN` gave.
        card: for a folder without a model: the text of `README.md` by the full name of the repository, where that has
            neither a card nor a model.
        say: is told what happens.

    Raises:
        PushError: one sentence. The same call goes on then: what has arrived is not sent twice.
    """
    stage = Path(stage)
    push = _Push(HfApi(token=token, library_name="hf-memory", library_version=hf_memory.__version__), repo, say)
    push.where = {"revision": revision, "create_pr": create_pr}
    verbosity = hub_logging.get_verbosity()
    # What the client would say of its own attempts ends in a sentence of ours.
    hub_logging.set_verbosity_error()
    try:
        push.name_owner()
        push.make_room(private)
        if card is not None and push.needs_card():
            (stage / CARD).write_text(card(push.repo), encoding="utf-8")
        return push.commit(stage, message or f"Upload {stage.name} with hf-memory", description, replace)
    except Exception as error:  # what `explain` does not know is raised as it is
        text = push.explain(error)
        if text is None:
            raise
        raise PushError(_without_token(text, token)) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> str:
    """
    `push_to_hub` of our models: as in transformers, and with the code that they need and a filled card.

    Args:
        model: what to push.
        repo_id: `namespace/name`; a name alone belongs to the user of the token.
        commit_message: default: `Upload <class> with hf-memory`.
        commit_description: of the commit.
        private: of a new repository.
        token: default: the one that `hf auth login` or `HF_TOKEN` gave.
        revision: branch; made if it is not there.
        create_pr: open a pull request.
        max_shard_size: of the files of weights.
        tags: more of them for the card.

    Returns:
        Page of the commit or of the pull request.

    Raises:
        PushError: see `push_folder`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        export_remote_code(model, folder)
        cards.write_card(folder, model.config, metadata={"tags": tags})
        message = commit_message or f"Upload {type(model).__name__} with hf-memory"
        pushed = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            description=commit_description,
            replace=True,
            token=token,
        )
    return pushed.url


class _Push:
    """One call of `push_folder`."""

    def __init__(self, api: HfApi, repo: str, say: Callable[[str], None]) -> None:
        self.api, self.repo, self.say = api, repo, say
        self.where: dict[str, Any] = {}

    @property
    def branch(self) -> str | None:
        return self.where["revision"]

    def name_owner(self) -> None:
        """Complete a name without a namespace, and find out who pushes."""
        validate_repo_id(self.repo)
        if self.where["create_pr"] and self.branch not in (None, "main"):
            raise PushError(
                f"A pull request starts from the main branch, not from {self.branch!r}: drop one of --create-pr and "
                "--revision."
            )
        self.user = self._persist(self.api.whoami)["name"]
        if "/" not in self.repo:
            self.repo = f"{self.user}/{self.repo}"

    def make_room(self, private: bool | None) -> None:
        """Create repository and branch where they are missing. A pull request is for what is there."""
        if self.where["create_pr"] or (self.branch or "").startswith("refs/"):
            return
        existed = self._persist(lambda: self.api.repo_exists(self.repo))
        self._persist(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))
        if private and existed and not self._persist(lambda: self.api.model_info(self.repo)).private:
            raise PushError(
                f"The repository {self.repo!r} is there already and public: make it private in its settings, drop "
                "--private, or choose another name."
            )
        if self.branch is not None:
            self._persist(lambda: self.api.create_branch(self.repo, branch=self.branch, exist_ok=True))

    def needs_card(self) -> bool:
        """Whether a card on something else than a model is missing."""
        return self._remote_text(CARD) is None and self._remote_text(CONFIG_NAME) is None

    def commit(self, stage: Path, message: str, description: str | None, replace: bool) -> Pushed:
        files = {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}
        size = readable_size(sum(path.stat().st_size for path in files.values()))
        self.say(f"Pushing {len(files)} files, {size}, to {self.api.endpoint}/{self.repo}")
        if CONFIG_NAME in files and not replace:
            self._refuse_other_model(json.loads((stage / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"])
        if CARD in files and cards.is_ours(files[CARD]) and self._has_handmade_card():
            self.say("The card in the repository was written by hand, and stays.")
            del files[CARD]
        return self._persist(lambda: self._commit_once(files, message, description))

    def _commit_once(self, files: dict[str, Path], message: str, description: str | None) -> Pushed:
        # Everything anew: whether an earlier attempt has arrived is seen only in what the Hub has now.
        opened = self._own_pull_request(message) if self.where["create_pr"] else None
        revision = f"refs/pr/{opened}" if opened is not None else self.branch
        before = self.api.model_info(self.repo, revision=revision)
        stale = [item.rfilename for item in before.siblings or () if STALE.fullmatch(item.rfilename)]
        stale = stale if CONFIG_NAME in files else []
        info = self.api.create_commit(
            self.repo,
            [CommitOperationAdd(name, path) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in stale if name not in files],
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=self.where["create_pr"] and opened is None,
        )
        is_new = info.oid != before.sha
        if not is_new:
            self.say("All of it was there already: no commit was made.")
        url = info.pr_url or str(info.commit_url)
        if opened is not None:
            url = f"{self.api.endpoint}/{self.repo}/discussions/{opened}"
        return Pushed(self.repo, url, info.oid, is_new)

    def _own_pull_request(self, title: str) -> int | None:
        found = self.api.get_repo_discussions(
            self.repo, author=self.user, discussion_type="pull_request", discussion_status="open"
        )
        return next((request.num for request in found if request.title == title), None)

    def _refuse_other_model(self, model_type: str) -> None:
        text = self._remote_text(CONFIG_NAME)
        there = json.loads(text).get("model_type") if text else None
        if there not in (None, model_type):
            raise PushError(
                f"The repository {self.repo!r} holds a {there} model, and this is a {model_type} model: choose "
                "another name, or pass --force (replace=True) to put it in its place."
            )

    def _has_handmade_card(self) -> bool:
        text = self._remote_text(CARD)
        return text is not None and cards.MARK not in text

    def _remote_text(self, name: str) -> str | None:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                file = self._persist(
                    lambda: self.api.hf_hub_download(self.repo, name, revision=self.branch, local_dir=scratch)
                )
                return Path(file).read_text(encoding="utf-8", errors="replace")
        except RemoteEntryNotFoundError:
            return None

    def _persist(self, call: Callable[[], Any]) -> Any:
        """The result of a call, which is made again while what stops it may pass."""
        for attempt in range(TRIES):
            try:
                return call()
            except Exception as error:  # what does not pass by itself is raised as it is
                wait = _pause(error, attempt)
                if wait is None or attempt == TRIES - 1:
                    raise
                self.say(f"{_problem(error)}: trying again in {wait:g} s")
                time.sleep(wait)

    def explain(self, error: Exception) -> str | None:
        """A sentence on an error of the client; `None` for one that is not of the Hub."""
        page = f"{self.api.endpoint}/{self.repo}"
        cause = next((part for part in _chain(error) if isinstance(part, HfHubHTTPError)), None)
        status = cause.response.status_code if cause is not None else None
        if isinstance(error, PushError):
            return str(error)
        if isinstance(error, HFValidationError):
            return f"{self.repo!r} is no name for a repository: give NAME, USER/NAME or ORGANISATION/NAME."
        if isinstance(error, LocalTokenNotFoundError):
            return "Nobody is logged in: run `hf auth login`, or set HF_TOKEN to a token that may write."
        if isinstance(error, OfflineModeIsEnabled):
            return "The Hub is switched off by HF_HUB_OFFLINE: unset it to push."
        if isinstance(error, ValueError) and "README.md" in str(error):
            return f"The header of README.md is not accepted: {_one_line(str(error))}"
        if isinstance(cause, RepositoryNotFoundError):
            return f"There is no repository {self.repo!r} that this token can see."
        if isinstance(cause, RevisionNotFoundError):
            return f"The repository {self.repo!r} has no revision {self.branch!r}."
        if status == 401:
            return "The token is not valid: run `hf auth login`, or set HF_TOKEN to another one."
        if status == 403:
            who = getattr(self, "user", "this user")
            return (
                f"The token of {who!r} may not write to {page}: use one that may, choose a name of your own, or pass "
                "--create-pr to propose the change."
            )
        if status is not None and status not in _PASSING:
            return f"The Hub refused ({status}): {_one_line(cause.server_message or str(cause))}"
        if status is not None or _is_network(error):
            return (
                f"{_problem(error)}, after {TRIES} attempts: run it again to go on, what has arrived at {page} is not "
                "sent twice."
            )
        return None


def _read_config(folder: Path) -> Any:
    if not folder.is_dir():
        raise PushError(f"There is no folder {str(folder)!r}.")
    if not (folder / CONFIG_NAME).is_file():
        raise PushError(f"The folder {str(folder)!r} holds no {CONFIG_NAME}, so it is not a saved model.")
    try:
        model_type = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        raise PushError(f"{str(folder / CONFIG_NAME)!r} is not a valid JSON file.") from None
    if model_type not in EXPORTABLE:
        raise PushError(
            f"{str(folder)!r} holds a model of type {model_type!r}, which needs nothing of hf-memory: "
            f"`hf upload REPO {folder}` pushes it."
        )
    return AutoConfig.from_pretrained(folder)


def _link(file: Path, link: Path) -> None:
    try:
        os.symlink(file.resolve(), link)
    except OSError:
        shutil.copyfile(file, link)


def _chain(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_network(error: BaseException) -> bool:
    # The client's HTTP library has another name in each major version.
    roots = {type(part).__module__.split(".")[0] for part in _chain(error)}
    return bool(roots & {"httpx", "httpx2"}) or isinstance(error, (ConnectionError, TimeoutError))


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt; `None` where it would fail in the same way."""
    for part in _chain(error):
        if isinstance(part, HfHubHTTPError):
            if part.response.status_code not in _PASSING:
                return None
            told = part.response.headers.get("Retry-After", "")
            return float(told) if told.isdigit() else 2.0**attempt
    return 2.0**attempt if _is_network(error) else None


def _problem(error: Exception) -> str:
    for part in _chain(error):
        if isinstance(part, HfHubHTTPError):
            return f"The Hub answered {part.response.status_code}"
    return "The Hub cannot be reached"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _without_token(text: str, token: str | bool | None) -> str:
    for secret in (token if isinstance(token, str) else None, get_token()):
        if secret:
            text = text.replace(secret, "<token>")
    return text
