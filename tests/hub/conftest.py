"""A loopback Hub, and this process and its children turned to it."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http
from loopback import LoopbackHub
from transformers.utils import hub as transformers_hub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A fresh Hub on the loopback interface, see `loopback.py`. Nothing of this process knows of it."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def online(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The Hub of `hub`, to which `huggingface_hub` and transformers talk in this process and in processes it starts.

    The user is `tester` with a token that writes, and the local cache is empty. What the client would wait before it
    tries again is in `hub.waits` and not waited for.
    """
    home = tmp_path / "hf_home"
    environment = {**hub.environment, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # The instances behind `huggingface_hub.create_repo` and its like, and behind transformers.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    hub.waits = []
    clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(clock), sleep=hub.waits.append))
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
