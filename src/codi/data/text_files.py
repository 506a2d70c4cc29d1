"""Strict reading of text files in bounded time: UTF-8, rows of metadata, YAML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from ..errors import UserError, one_line
from .formats import read_file

METADATA = ("metadata.jsonl", "metadata.csv")
YAML_BYTES = 100_000  # per text: PyYAML reads about 100 kB per second
YAML_DEPTH = 30  # PyYAML is recursive
YAML_VALUES = 10_000


def decode_text(data: bytes, name: object) -> str:
    """Decode UTF-8 text, with or without a byte order mark. Raises UserError, naming `name`, for anything else."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if utf16 or b"\0" in data:
        fault = "UTF-16 text" if utf16 else "no UTF-8 text (it holds zero bytes, as UTF-16 does)"
        raise UserError(f"{name}: is {fault}: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}: line {line} is not UTF-8 text: save it as UTF-8") from None


def parse_json(text: str | bytes, name: object, fix: str) -> dict[str, Any]:
    """Parse one JSON object. Raises UserError, with `name` and the advice `fix`, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({one_line(error)}): {fix}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object: {fix}")
    return value


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE: line N", row) for the rows of a metadata.jsonl or metadata.csv. Empty lines and empty CSV cells
    are skipped. Raises UserError for a file that cannot be read or is malformed."""
    try:
        text = decode_text(read_file(path), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    if path.suffix == ".csv":
        yield from _csv_rows(text, path)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.isspace():
            where = f"{path}: line {number}"
            yield (
                where,
                parse_json(line, where, 'write one JSON object per line, {"file_name": "a.png", "text": "..."}'),
            )


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row:
                raise UserError(f"{where} has more values than the header has names: put text with commas in quotes")
            yield where, {name: value for name, value in row.items() if value}
    except csv.Error as error:
        where = f"{path}: after line {reader.reader.line_num - 1}"
        raise UserError(f"{where}: not CSV ({error}): double the quotes within a quoted text") from None


class _BoundedLoader(yaml.SafeLoader):
    """YAML loader with limits: YAML_VALUES values, counting expanded aliases, and YAML_DEPTH levels."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._count = 0, 0
        self._sizes: dict[int, int] = {}  # id of a node -> number of values in it

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._count
        self._depth += 1
        if self._depth > YAML_DEPTH:
            raise ComposerError(None, None, f"nested more than {YAML_DEPTH} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise ComposerError(None, None, f"*{event.anchor} refers to itself", event.start_mark)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
        if self._count > YAML_VALUES:
            raise ComposerError(None, None, f"more than {YAML_VALUES:,} values, aliases included", event.start_mark)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of a value, without its position, e.g. KeyError of !!bool
            raise ConstructorError(None, None, str(error) or type(error).__name__, node.start_mark) from error


def parse_yaml(text: str) -> Any:
    """Parse a small YAML text. Raises ValueError, of one line with the position, for text that is not valid YAML, too
    long, too deeply nested or too large with its aliases expanded."""
    if len(text) > YAML_BYTES:
        raise ValueError(f"longer than {YAML_BYTES:,} characters")
    try:
        return yaml.load(text, _BoundedLoader)  # a subclass of SafeLoader
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: {chr(int(error.character))!a}: {error.reason}") from error
    except yaml.MarkedYAMLError as error:  # its own message has "<unicode string>" in place of the file name
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + one_line(", ".join(filter(None, (error.context, error.problem))))) from error
    except Exception as error:  # e.g. OverflowError of "\\Uffffffff"
        raise ValueError(one_line(error) or type(error).__name__) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines. Raises UserError for anything else."""
    try:
        if path.stat().st_size > YAML_BYTES:
            raise UserError(f"{path}: is longer than {YAML_BYTES:,} bytes: give a YAML file of settings")
        values = parse_yaml(decode_text(read_file(path), path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error)}): correct that line") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a list of `key: value` lines: correct the file")
    return values
