"""Configurations from YAML and ``key=value`` words, back to YAML, and what is wrong with one in a sentence."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from unisono.config.models import Config
from unisono.errors import ConfigurationError

T = TypeVar("T", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``dotted.key=value`` words, whose values are YAML too.

    Raises:
        ConfigurationError: for a file that cannot be read, and for every key or value that is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text in UTF-8: {error.reason}; save it as UTF-8") from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot read configuration {path}: {error.strerror}; give an existing YAML file"
        ) from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} holds {type(data).__name__}; a configuration is a mapping of keys to values")
    for word in overrides:
        _override(data, word)
    return validate(Config, data, str(path))


def _override(data: dict[str, Any], word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"override {word!r} is not of the form key=value, for example layout.data=2")
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.get(parent)
        if inner is None:
            inner = data[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigurationError(f"override {word!r}: {parent} is a value, not a section")
        data = inner
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"override {word!r}: the value is not valid YAML") from error


def validate(model: type[T], data: Mapping[str, Any], source: str) -> T:
    """Make ``data`` into ``model``, or say in one sentence what is wrong, key by key."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(model, data, dict(detail)) for detail in error.errors()]
        raise ConfigurationError(f"{source}: " + "; ".join(dict.fromkeys(problems))) from None


def _problem(model: type[BaseModel], data: Mapping[str, Any], detail: dict[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = list(_section(model, location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if detail["type"] == "missing":
        return f"key {key} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:5] in ("Input", "Strin") else message
    return f"{key} = {detail['input']!r}: {message}" if key else message


def _section(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    for part in location:
        annotation = model.model_fields[part].annotation
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return model


def to_yaml(config: BaseModel, *, defaults: bool = True) -> str:
    """The resolved configuration as YAML, with or without the keys that have their default values."""
    data = config.model_dump(mode="json", exclude_defaults=not defaults)
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text


def _kind(annotation: object) -> str:
    """A type as a reader of the reference knows it."""
    if get_origin(annotation) is Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_kind(part) for part in get_args(annotation) if part is not type(None))
    return str(annotation) if get_args(annotation) else str(getattr(annotation, "__name__", annotation))


def reference(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every key with its type, default and meaning: the configuration reference of the docs."""
    rows = []
    for name, field in model.model_fields.items():
        inner = _section(model, [name])
        if inner is not model and field.annotation is not None:
            rows += reference(inner, f"{prefix}{name}.")
            continue
        kind = _kind(field.annotation)
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else "" if value is None else f"`{value}`"
        rows.append((f"{prefix}{name}", kind, default, field.description or ""))
    return rows
