"""Recipes as YAML: the values and the line of each, and those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hf_memory.conversion.schema import ConversionError, FileList, FileMapping, nearest, plain


SHIPPED = Path(__file__).with_name("recipes")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; `default` is first."""
    files = sorted(SHIPPED.glob("*.yaml"), key=lambda file: (file.stem != "default", file.stem))
    return {file.stem: file for file in files}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        ConversionError: There is neither.
    """
    path, known = Path(name).expanduser(), shipped_recipes()
    if path.is_file() or str(name) not in known:
        if not path.exists() and not path.suffix and len(path.parts) == 1:
            hint = nearest(str(name), known)
            raise ConversionError(
                f"There is no recipe {str(name)!r}{hint}{' Name' if hint else ': name'} a YAML file or one of "
                f"{', '.join(known)}."
            )
        return path
    return known[str(name)]


def read_yaml(path: str | Path) -> FileMapping:
    """The mapping in a YAML file, in which every mapping knows the lines of its keys.

    Raises:
        ConversionError: The file cannot be read, is no YAML, holds no mapping, or names a key twice.
    """
    name = str(path)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConversionError(f"The recipe {name!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConversionError(f"The recipe {name!r} is no text in UTF-8 ({error.reason}).") from error
    try:
        loader = yaml.SafeLoader(text)
        values = _Reader(loader, name).value(loader.get_single_node())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConversionError(f"{name}{line}: this is no YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"The recipe {name!r} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, FileMapping):
        raise ConversionError(f"The recipe {name!r} must be a mapping from keys to values, got {plain(values)!r}.")
    return values


class _Reader:
    """Values of the nodes of a YAML file."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader, self.name = loader, name
        # Nodes by id: what an anchor shares is read more than once.
        self.seen: set[int] = set()

    def value(self, node: yaml.Node | None) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return FileList(
                [self.value(part) for part in node.value], [part.start_mark.line + 1 for part in node.value]
            )
        if node is not None and node.tag == "tag:yaml.org,2002:bool" and node.value.lower() in ("on", "off"):
            # A control is called so; true and false, yes and no stay what they are.
            return node.value
        return None if node is None else self.loader.construct_object(node, deep=True)

    def mapping(self, node: yaml.MappingNode) -> FileMapping:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                # What `<<` brings in may stand here again; that is what it is for.
                continue
            key, line = self.key(key_node), key_node.start_mark.line + 1
            # Flattened before, a node has the keys of `<<` in front of its own.
            if key in lines and id(node) not in self.seen:
                raise ConversionError(f"{self.name}, line {line}: `{key}` is given on line {lines[key]} already.")
            lines[key] = line
        self.seen.add(id(node))
        self.loader.flatten_mapping(node)
        # Behind those of `<<` come the mapping's own keys, which win.
        values, places = {}, {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            values[key], places[key] = self.value(value_node), key_node.start_mark.line + 1
        return FileMapping(values, self.name, node.start_mark.line + 1, places)

    def key(self, node: yaml.Node) -> str:
        key = self.loader.construct_object(node, deep=True) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise ConversionError(f"{self.name}, line {node.start_mark.line + 1}: a key must be a word.")
        return key
