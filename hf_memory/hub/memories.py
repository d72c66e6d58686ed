"""Memory files on the Hub."""

import tempfile
from pathlib import Path, PurePosixPath

from hf_memory.cache import MemoryCache
from hf_memory.hub.push import STALE, push_folder
from hf_memory.memory_file import FILE_NAME, MemoryInfo, write_memory


CARD = """---
library_name: hf-memory
tags:
- hf-memory
- memory-file
{base_model}---

# What a model has read

A memory file of a {model_type} model{name}: {tokens:,} tokens read, {nbytes:,} bytes. It goes on with the model that
made it and with no other.

```python
import hf_memory
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({model!r})
memory = hf_memory.MemoryCache.from_pretrained({repo_id!r}, model=model{filename})
```
"""


def push_memory(
    memory: MemoryCache,
    repo_id: str,
    filename: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """`MemoryCache.push_to_hub`: put a memory into a repository, in one commit.

    A repository that has neither a card nor a model gets a card.

    Args:
        memory: the memory.
        repo_id: `namespace/name`; a name alone belongs to the user of the token. The repository is made if need be.
        filename: name of the file there, `"memory.safetensors"` by default; it ends in `.memory` or `.safetensors`,
            and may lie in a folder.
        private: of a new repository.
        revision: branch.
        create_pr: open a pull request.
        commit_message: default: `Upload <filename>`.
        token: default: the one that `hf auth login` or `HF_TOKEN` gave.

    Returns:
        Page of the commit or of the pull request.

    Raises:
        ValueError: for a name that is no place for a memory, before anything is written or sent.
        PushError: one sentence, when the Hub refuses or cannot be reached; the same call makes up for it.
    """
    filename = filename or FILE_NAME
    _check_name(filename)
    info = memory.info
    with tempfile.TemporaryDirectory() as folder:
        write_memory(memory, Path(folder) / filename)
        pushed = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=commit_message or f"Upload {filename}",
            token=token,
            card=lambda repo: memory_card(info, repo, filename),
        )
    return pushed.url


def memory_card(info: MemoryInfo, repo_id: str, filename: str = FILE_NAME) -> str:
    """Card of a repository with a memory file."""
    name = info.model.name
    return CARD.format(
        base_model=f"base_model: {name}\n" if name else "",
        model_type=info.model.model_type,
        name=f", [{name}](https://huggingface.co/{name})" if name else "",
        tokens=info.tokens,
        nbytes=info.nbytes,
        model=name or "the model that made it",
        repo_id=repo_id,
        filename="" if filename == FILE_NAME else f", filename={filename!r}",
    )


def _check_name(filename: str) -> None:
    """Refuse names that lead out of the repository, that loading would not find, or that are a model's own."""
    path = PurePosixPath(filename)
    is_inside = str(path) == filename and not path.is_absolute() and ".." not in path.parts and "\\" not in filename
    if not is_inside or path.suffix not in (".memory", ".safetensors") or STALE.fullmatch(filename):
        raise ValueError(
            f"A memory cannot be called {filename!r} in a repository: give a relative name that ends in `.memory` or "
            "`.safetensors` and is not that of a model's weights, such as 'book.memory'."
        )
