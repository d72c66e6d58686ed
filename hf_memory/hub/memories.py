"""Memory files on the Hub."""

import tempfile
from pathlib import Path

from hf_memory.cache import MemoryCache
from hf_memory.hub.push import push_folder
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
    """`MemoryCache.push_to_hub`: put a memory into a repository, in one commit, with a card if it has none.

    Args:
        memory: the memory.
        repo_id: `namespace/name`; the repository is made if need be.
        filename: name of the file there, `"memory.safetensors"` by default.
        private: of a new repository.
        revision: branch.
        create_pr: open a pull request.
        commit_message: default: `Upload <filename>`.
        token: default: the one that `hf auth login` or `HF_TOKEN` gave.

    Returns:
        Page of the commit or of the pull request.

    Raises:
        PushError: one sentence, when the Hub refuses or cannot be reached; the same call makes up for it.
    """
    filename = filename or FILE_NAME
    with tempfile.TemporaryDirectory() as folder:
        write_memory(memory, Path(folder) / filename)
        Path(folder, "README.md").write_text(memory_card(memory.info, repo_id, filename), encoding="utf-8")
        pushed = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=commit_message or f"Upload {filename}",
            token=token,
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
