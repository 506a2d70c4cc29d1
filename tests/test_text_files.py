"""Text files of users: malformed ones are refused in one line and in bounded time."""

import json
import time

import pytest

from codi.data.text_files import decode_text, parse_yaml, read_rows, read_yaml
from codi.evaluation.suite import load_suite
from codi.training.recipe import parse_overrides, read_recipe
from folders import refused


def bomb(line):
    """Return YAML of ten levels, each of which names the one before it ten times."""
    names = "abcdefghij"
    return "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {line(f'*{a}')}\n" for a, b in zip(names, names[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (bomb(lambda name: f"[{','.join([name] * 10)}]"), "more than 10,000 values, aliases included"),
        (bomb(lambda name: f"{{<<: [{','.join([name] * 10)}]}}"), "more than 10,000 values, aliases included"),
        ("a: " + "[" * 500 + "]" * 500, "nested more than 30 levels deep"),
        ("".join(" " * i + "a:\n" for i in range(400)), "nested more than 30 levels deep"),
        ("a: " + "[" * 40_000, "nested more than 30 levels deep"),
        ("a: &a [*a]", "*a refers to itself"),
        ("a: &a {<<: *a}", "*a refers to itself"),
        ("a: 2024-13-45", "month"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("a: !!bool x", "x"),
        ("a: !!timestamp x", "NoneType"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a" * 200_000, "longer than"),
        ("- 1", "not a list of `key: value` lines"),
        ("", "not a list of `key: value` lines"),
    ],
)
def test_yaml_is_bounded(tmp_path, text, fragment):
    file, start_time = tmp_path / "recipe.yaml", time.perf_counter()
    file.write_text(text)
    for read in (read_recipe, load_suite):
        message = refused(lambda read=read: read(file), file, fragment)
        assert len(message) < 800
    assert time.perf_counter() - start_time < 5


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: 1\nb: [1, 2", "line 2, column 9: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\nb: c: d", "line 2, column 5: mapping values are not allowed here"),
        ("a: 1\nb: @x", "line 2, column 4: while scanning for the next token, found character '@'"),
        ("a: 1\nb: *x", "line 2, column 4: found undefined alias 'x'"),
        ("a: 1\nb: \a", r"line 2: '\x07': special characters are not allowed"),
        ("a: 1\nb: 2024-13-45", "line 2, column 4: month must be in 1..12"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document"),
        ('a: "\\Uffffffff"', "Python int too large to convert"),
    ],
)
def test_yaml_errors_name_the_file_and_the_line(tmp_path, text, fragment):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    for read in (read_recipe, load_suite):
        message = refused(lambda read=read: read(file), f"{file}: not valid YAML ({fragment}", "): correct that line")
        assert "unicode string" not in message


def test_common_yaml_is_read(tmp_path):
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftask: depth\r\n")
    assert read_yaml(tmp_path / "a.yaml") == {"task": "depth"}
    assert parse_overrides(["--model", "@x", "--lora", "*x", "--seed=3"]) == {"model": "@x", "lora": "*x", "seed": 3}
    (tmp_path / "a.yaml").write_bytes("task: depth".encode("utf-16"))
    refused(lambda: read_yaml(tmp_path / "a.yaml"), "a.yaml: is UTF-16 text: save it as UTF-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding):
    refused(lambda: decode_text("a caption".encode(encoding), "x.txt"), "x.txt: is ", "UTF-16", "save it as UTF-8")


def test_rows_are_lines_of_json_or_of_csv(tmp_path):
    rows = [{"file_name": "a.png", "text": "a caf\u00e9, \u2028 \x85"}, {"file_name": "b.png", "text": 'two "quotes"'}]
    lines, cells = tmp_path / "metadata.jsonl", tmp_path / "metadata.csv"
    lines.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig", newline="")
    cells.write_text('file_name,text,mask\na.png,"a caf\u00e9, \u2028 \x85",\n\nb.png,"two ""quotes"""\n', "utf-8")
    assert list(read_rows(lines)) == [(f"{lines}: line {n}", row) for n, row in enumerate(rows, 1)]
    assert list(read_rows(cells)) == [(f"{cells}: line {n}", row) for n, row in zip((2, 4), rows, strict=True)]


@pytest.mark.parametrize(
    ("name", "data", "fragment"),
    [
        ("metadata.jsonl", b'{"a": 1}\n' + "{\"a\": 'é'}".encode("latin-1"), "line 2 is not UTF-8 text"),
        ("metadata.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16 text"),
        ("metadata.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "line 2 is not JSON (maximum recursion"),
        ("metadata.jsonl", b'{"a": 1}\n[1]', "line 2 is not a JSON object"),
        ("metadata.jsonl", b"{" + b"x" * 5_000, "line 1 is not JSON"),
        ("metadata.csv", b"file_name,text\na.png,one, two\n", "line 2 has more values than the header"),
        ("metadata.csv", b'file_name,text\na.png,"one"two"\n', "not CSV"),
        ("metadata.csv", b'file_name,text\na.png,"one\n', "not CSV"),
        ("metadata.csv", b"file_name\n" + b"a" * 200_000, "field limit"),
        ("metadata.csv", "file_name,text\né,".encode("latin-1"), "line 2 is not UTF-8 text"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, data, fragment):
    (tmp_path / name).write_bytes(data)
    assert len(refused(lambda: list(read_rows(tmp_path / name)), tmp_path / name, fragment)) < 500
