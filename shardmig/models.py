"""The application's models: imported from where the configuration says, as SQLAlchemy's metadata."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import MetaData

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from shardmig.config import Config

__all__ = ["load_models"]


def load_models(config: Config) -> tuple[MetaData, ...]:
    """
    Import every entry of `models`.

    An entry is "package.module:Base.metadata"; a declarative base or a table's owner will do too, as whatever has a
    `metadata`. The configuration's directory is on the import path.

    Raises:
        ConfigError: no models are configured, one cannot be imported, or two describe the same table.
    """
    if not config.models:
        raise ConfigError(
            'no models to compare with: add models = ["package.module:Base.metadata"] to the configuration'
        )
    if str(config.root) not in sys.path:
        sys.path.insert(0, str(config.root))
    found = [_metadata(entry) for entry in config.models]
    distinct = tuple({id(metadata): metadata for metadata in found}.values())
    _refuse_twice(distinct)
    return distinct


def _metadata(entry: str) -> MetaData:
    name, colon, attributes = entry.partition(":")
    if not (name and colon and attributes):
        raise ConfigError(f'models: {entry!r} names no object; write "package.module:Base.metadata"')
    try:
        value: object = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"models: {entry!r} cannot be imported: {_reason(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            raise ConfigError(f"models: {entry!r}: there is no {attribute} in {_spoken(value)}; correct the name")
        value = getattr(value, attribute)
    if not isinstance(value, MetaData):
        value = getattr(value, "metadata", value)
    if not isinstance(value, MetaData):
        raise ConfigError(f"models: {entry!r} is no MetaData but {_spoken(value)}; name the metadata of your models")
    return value


def _reason(error: BaseException) -> str:
    """Say what went wrong and in which line of the models, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _machinery(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}:{error.lineno})"
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def _machinery(filename: str) -> bool:
    return filename.startswith("<") or filename == __file__ or Path(filename).parent.name == "importlib"


def _spoken(value: object) -> str:
    name = getattr(value, "__name__", None)
    return f"{type(value).__name__} {name}" if isinstance(name, str) else type(value).__name__


def _refuse_twice(all_metadata: tuple[MetaData, ...]) -> None:
    seen: set[str] = set()
    for metadata in all_metadata:
        for key in metadata.tables:
            if key in seen:
                raise ConfigError(f"models: table {key} is described twice, by two metadata objects; keep one of them")
            seen.add(key)
