"""A configuration as YAML to start from: every key with its value, meaning, kind and bounds.

What a key means is read from the "Attributes" section of its model's docstring, or of a base's.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WIDTH = 100
_INDENT = "  "
_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
    "min_length": "{} or more of them",
}
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


def settings_yaml(settings: BaseModel) -> str:
    """A file that `load_config` makes the same settings of.

    Args:
        settings: Defaults, and an example for each key that has none.
    """
    text = ""
    for line in _model_lines(settings):
        # A comment that is not indented begins a key of the top level: set off by an empty line.
        previous = text.rpartition("\n")[0].rpartition("\n")[2]
        text += "\n" * (line[0] == "#" and previous[:1] not in ("", "#")) + f"{line}\n"
    return text


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What each key of a model means, by its docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.__doc__:
            found |= _attributes(inspect.cleandoc(base.__doc__))
    for key, field in model.model_fields.items():
        inner = field.annotation
        if key not in found and isinstance(inner, type) and issubclass(inner, BaseModel):
            found[key] = inspect.cleandoc(inner.__doc__ or "").partition("\n\n")[0]
    return {key: text for key, text in found.items() if key in model.model_fields}


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a section "Attributes:", also of several names, each on one line."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(section[1] if section else "").splitlines():
        if entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "`") for name, text in found.items()}


def _model_lines(settings: BaseModel, depth: int = 0) -> Iterator[str]:
    texts = meanings(type(settings))
    for key, field in type(settings).model_fields.items():
        yield from textwrap.wrap(
            _comment(texts.get(key, ""), field),
            _WIDTH - depth * len(_INDENT),
            initial_indent="# ",
            subsequent_indent="# ",
        )
        yield from _entry_lines(key, getattr(settings, key), depth)


def _comment(text: str, field: FieldInfo) -> str:
    if field.is_required():
        text = f"{text} Required: what stands here is an example."
    kind = _kind(field)
    return f"{text} ({kind})".strip() if kind else text


def _entry_lines(key: str, value: object, depth: int) -> Iterator[str]:
    """A key and its value: a block where models are inside, else one line."""
    if isinstance(value, BaseModel):
        yield f"{key}:"
        yield from _indented(_model_lines(value, depth + 1))
    elif isinstance(value, Mapping) and _holds_models(value.values()):
        yield f"{key}:"
        for name, inner in value.items():
            yield from _indented(_entry_lines(_inline(name), inner, depth + 1))
    elif isinstance(value, tuple) and _holds_models(value):
        yield f"{key}:"
        for index, inner in enumerate(value):
            lines = _model_lines(inner, depth + 2)
            if index:  # explained with the first
                lines = (line for line in lines if not line.lstrip().startswith("#"))
            first, *rest = lines
            yield from _indented([f"- {first}", *_indented(rest)])
    else:
        yield f"{key}: {_inline(value)}"


def _holds_models(values: Any) -> bool:
    return bool(values) and all(isinstance(value, BaseModel) for value in values)


def _indented(lines: Any) -> Iterator[str]:
    return (f"{_INDENT}{line}" for line in lines)


def _inline(value: object) -> str:
    """A value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _kind(field: FieldInfo) -> str:
    """What values a key takes, in words: "whole number, at least 1"; "" for a model."""
    bounds = [
        words.format(_number(getattr(limit, name)))
        for limit in field.metadata
        for name, words in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    kind = _type_words(field.annotation)
    return ", ".join([kind, *bounds]) if kind else ""


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(arguments[0])
    if origin is Literal:
        return "one of: " + ", ".join(_inline(value) for value in arguments)
    if origin in (Union, types.UnionType):
        words = [_type_words(argument) for argument in arguments]
        return " or ".join(words) if all(words) else ""
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return "list"
    if origin is tuple:
        return f"list of {len(arguments)}"
    if origin is dict:
        return "mapping of names"
    return _WORDS.get(annotation, "")
