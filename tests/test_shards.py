"""Many WebDataset shards: read a few at a time and exactly resumed, indexed once, fetched, some broken."""

import functools
import http.server
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import fsspec
import numpy as np
import pytest

from codi.data import shards as module
from codi.data.batches import batches
from codi.data.samples import CorruptSample, order
from codi.data.shards import expand, open_shard
from codi.data.sources import open_source
from codi.data.tars import FULL_SHUFFLE, WINDOW
from folders import noise, read, refused, rows_of, same, shard


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A cache folder of its own; nobody waits between attempts."""
    monkeypatch.setenv("CODI_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return tmp_path / "kept"


@pytest.fixture
def parts(photos, tmp_path):
    """The twelve photos in four tars."""
    return split(photos, tmp_path / "parts", 4)


def split(photos, folder, count, each=3):
    folder.mkdir()
    rows = rows_of(photos)
    for k in range(count):
        chosen = [rows[(each * k + i) % len(rows)] for i in range(each)]
        shard(photos, folder / f"part-{k:03d}.tar", chosen)
    return folder


def test_braces():
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    assert expand("plain{}.tar") == ["plain{}.tar"]
    refused(lambda: expand("a-{3..1}.tar"), "a-{3..1}.tar", "{1..3}")


@pytest.mark.parametrize("spec", ["x-{0..99999999}.tar", "x-" + "{0..9}" * 8 + ".tar", "x-" + "{a,b}" * 40 + ".tar"])
def test_more_shards_than_fit_the_memory_are_refused(spec):
    refused(lambda: open_source(spec), spec, "name at most 100,000 in one data set")
    assert expand("x-{0..9999999999999999999}") == ["x-0..9999999999999999999"]  # no number of shards


@pytest.mark.parametrize(
    "change",
    [
        {"members": []}, {"members": {"a": []}}, {"members": {"a": {"png": 3}}}, {"members": {"a": {"png": [0]}}},
        {"members": {"a": {"png": [-1, 2]}}}, {"members": {"a": {"png": [0, 10**9]}}}, {"members": None},
        {"members": {"a": {"png": [0.5, 2]}}}, {"members": {"a": {"png": ["0", "2"]}}}, {"fault": 3}, {"size": "x"},
        {"stamp": [1]}, None,
    ],
)  # fmt: skip
def test_an_index_of_another_shape_is_none(parts, remote, kept, change):
    """Beside the shard, where it is made again, and uploaded with it, where the shard is fetched."""
    local = read(open_source(parts), range(12), 32)
    file = parts / ".part-001.tar.index.json"
    good = json.loads(file.read_text())
    text = "[" * 50_000 if change is None else json.dumps({**good, **change})
    file.write_text(text)
    assert all(map(same, local, read(open_source(parts), range(12), 32)))
    assert json.loads(file.read_text()) == good
    fsspec.filesystem("memory").pipe("/bucket/.part-001.tar.index.json", text.encode())
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    assert not list((kept / "indexes").glob("*.uploaded"))


def test_what_a_killed_process_left_beside_a_shard_is_removed(parts):
    old, young = (parts / f".{name}.12-34.partial" for name in (".part-000.tar.index.json", ".part-001.tar.index.json"))
    for file in (old, young):
        file.write_text("half")
    os.utime(old, (0, 0))
    open_source(parts)
    assert not old.exists() and young.exists()


def test_names_with_braces_are_the_folder(parts, tmp_path):
    a, b = open_source(parts), open_source(f"{parts}/part-{{000..003}}.tar")
    assert all(map(same, read(a, range(12), 32), read(b, range(12), 32)))
    refused(lambda: open_source(f"{parts}/part-{{003..004}}.tar"), "part-004.tar: no such file")
    refused(lambda: open_source(f"{parts}/part-{{000..001}}.zip"), "part-000.zip: not a .tar")


def test_a_shard_is_walked_once(parts, photos, kept, monkeypatch):
    first = read(open_source(parts), range(12), 32)
    walked = []
    walk = module._walk
    monkeypatch.setattr(module, "_walk", lambda file: walked.append(file.name) or walk(file))
    assert all(map(same, first, read(open_source(parts), range(12), 32))) and not walked
    shard(photos, parts / "part-001.tar", rows_of(photos)[:5])  # another one of the same name
    (parts / ".part-002.tar.index.json").write_text('{"stamp": ')  # half of an index
    assert len(open_source(parts)) == 14
    assert [name[-12:] for name in sorted(walked)] == ["part-001.tar", "part-002.tar"]
    (parts / ".part-003.tar.index.json").unlink()
    (parts / ".part-003.tar.index.json").mkdir()  # where nothing can be written
    walked.clear()
    assert len(open_source(parts)) == len(open_source(parts)) == 14
    assert len(walked) == len(list((kept / "indexes").iterdir())) == 1


def test_several_may_write_an_index_at_a_time(parts):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_shard(parts / "part-000.tar").members(), range(32)))
    assert all(json.dumps(f) == json.dumps(found[0]) for f in found)
    assert [f.name for f in parts.iterdir() if f.name.startswith(".")] == [".part-000.tar.index.json"]


def test_many_shards_are_read_a_few_at_a_time(photos, tmp_path):
    source = open_source(split(photos, tmp_path / "many", FULL_SHUFFLE + 3))
    count = len(source)
    epochs = [order(source, 5, epoch) for epoch in (0, 1)]
    assert all(sorted(found) == list(range(count)) for found in epochs) and list(epochs[0]) != list(epochs[1])
    for found in epochs:
        windows = [{i // 3 for i in found[at : at + 3 * WINDOW]} for at in range(0, count, 3 * WINDOW)]
        assert max(map(len, windows)) == WINDOW and sum(map(len, windows)) == FULL_SHUFFLE + 3
        assert list(found[: 3 * WINDOW]) != sorted(found[: 3 * WINDOW])
    run = list(islice(batches(source, 7, 32, seed=5), 20))  # more than an epoch
    assert [i for b in run for i in b.index][:count] == list(epochs[0])
    again = list(islice(batches(open_source(tmp_path / "many"), 7, 32, seed=5, start=63), 11))
    assert all(map(same, run[9:], again)) and [b.index for b in run[9:]] == [b.index for b in again]


def test_few_shards_and_folders_keep_their_order(parts, photos):
    expected = np.random.default_rng([5, 1, 0]).permutation(12).tolist()
    assert order(open_source(parts), 5, 1).tolist() == order(open_source(photos), 5, 1).tolist() == expected


def test_a_broken_shard_is_told_in_one_line_and_its_samples_count_as_corrupt(photos, tmp_path):
    folder = split(photos, tmp_path / "many", 40)
    whole = len(open_source(folder))
    cut, gone = folder / "part-007.tar", folder / "part-009.tar"
    cut.write_bytes(cut.read_bytes()[:-12000])
    with pytest.warns(UserWarning, match=r"part-007.tar: not a whole.*lost") as told:
        source = open_source(folder)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert len(source) == whole
    report = tmp_path / "report.json"
    stream = batches(source, 8, 32, seed=0, report=report)
    run = list(islice(stream, 15))
    stream.close()
    said = json.loads(report.read_text())
    assert 1 <= said["skipped"] < 3 and {f["file"] for f in said["files"]} == {str(cut)}
    assert all(b.image.shape[0] == 8 for b in run)
    gone.write_bytes(b"junk" * 500)
    (folder / "part-010.tar").write_bytes(b"")
    with pytest.warns(UserWarning, match="and 2 more shards"):
        source = open_source(folder)
    lost = [r for r in source.read(range(whole), 32) if isinstance(r, CorruptSample)]
    assert {r.file for r in lost} == {str(cut), str(gone), str(folder / "part-010.tar")}
    refused(lambda: list(islice(batches(source, 8, 32, seed=0), 15)), "corrupt, more than 5%")


@pytest.fixture
def remote(parts):
    """The tars in fsspec's memory."""
    system = fsspec.filesystem("memory")
    for path in sorted(parts.glob("*.tar")):
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket/part-{000..003}.tar"
    system.rm("/bucket", recursive=True)


def fetched(monkeypatch):
    names = []
    get = module.RemoteShard._get
    monkeypatch.setattr(
        module.RemoteShard, "_get", lambda self, path, to: names.append(path[-12:]) or get(self, path, to)
    )
    return names


def test_remote_shards_are_fetched_once(parts, remote, kept, monkeypatch):
    names = fetched(monkeypatch)
    local = read(open_source(parts), range(12), 32)
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    assert sorted(n for n in names if n.startswith("part")) == [f"part-{k:03d}.tar" for k in range(4)]
    names.clear()
    assert all(map(same, local, read(open_source(remote), range(12), 32))) and not names
    assert len(list((kept / "shards").iterdir())) == 4


def test_those_used_longest_ago_make_room(parts, remote, kept, monkeypatch):
    size = max(path.stat().st_size for path in parts.glob("*.tar"))
    monkeypatch.setenv("CODI_CACHE_GB", str(2.5 * size / 1e9))
    local = read(open_source(parts), range(12), 32)
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    left = [file.stat().st_size for file in (kept / "shards").iterdir()]
    assert 1 < len(left) < 4 and sum(left) <= 2.5 * size


def test_the_limit_holds_when_shards_are_fetched_at_the_same_time(parts, remote, kept, monkeypatch):
    size = max(path.stat().st_size for path in parts.glob("*.tar"))
    monkeypatch.setenv("CODI_CACHE_GB", str(2.5 * size / 1e9))
    together, get, seen = threading.Barrier(4), module.RemoteShard._get, set()

    def get_together(self, path, to):
        get(self, path, to)
        if path not in seen:  # not again for one that was removed before it was opened
            seen.add(path)
            together.wait(10)

    monkeypatch.setattr(module.RemoteShard, "_get", get_together)
    with ThreadPoolExecutor(4) as pool:  # room is made for each before any is complete
        for file in pool.map(lambda name: open_shard(name).open(), expand(remote)):
            file.close()
    left = [file.stat().st_size for file in (kept / "shards").iterdir()]
    assert 1 <= len(left) < 4 and sum(left) <= 2.5 * size


def test_a_download_that_breaks_off_is_tried_again(remote, monkeypatch):
    get, calls = module.RemoteShard._get, []

    def cut(self, path, to):
        calls.append(path)
        get(self, path, to)
        if path.endswith(".tar") and (calls.count(path) < 3 or "003" in path):
            to.write_bytes(to.read_bytes()[:-1])

    monkeypatch.setattr(module.RemoteShard, "_get", cut)
    with pytest.warns(UserWarning, match=r"part-003.tar: cannot be read \([\d,]+ of [\d,]+ bytes arrived\)"):
        source = open_source(remote)
    results = source.read(range(len(source)), 32)
    assert [isinstance(r, CorruptSample) for r in results] == [False] * 9 + [True] * 3


def test_a_shard_that_was_out_of_reach_is_asked_for_again_later(parts, remote, monkeypatch):
    source = open_source(remote)
    local, now, get = read(open_source(parts), range(12), 32), [0.0], module.RemoteShard._get
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for file in (module.cache_folder() / "shards").iterdir():
        file.unlink()

    def broken(self, path, to):
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(module.RemoteShard, "_get", broken)
    assert all(isinstance(r, CorruptSample) for r in source.read(range(12), 32))
    monkeypatch.setattr(module.RemoteShard, "_get", get)
    assert all(isinstance(r, CorruptSample) for r in source.read(range(12), 32))  # not a storm of questions
    now[0] = module.PAUSE
    assert all(map(same, local, read(source, range(12), 32)))


def test_unknown_protocols_are_told():
    refused(lambda: open_source("nothing://x/a.tar"), "nothing://x/a.tar", "nothing")


def test_shards_behind_http(parts, kept, monkeypatch):
    """With the indexes that were uploaded with them, nothing else is fetched at the start."""
    local = open_source(parts)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append((self.command, self.path))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=parts))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        source = open_source(f"{url}/part-{{000..003}}.tar")
        assert {path for command, path in asked if command == "GET"} == {
            f"/.part-{k:03d}.tar.index.json" for k in range(4)
        }
        assert not (kept / "shards").exists()
        assert all(map(same, read(local, range(12), 32), read(source, range(12), 32)))
        asked.clear()
        again = open_source(f"{url}/part-{{000..003}}.tar")
        assert all(map(same, read(local, range(12), 32), read(again, range(12), 32)))
        assert {command for command, _ in asked} == {"HEAD"}
        (parts / ".part-000.tar.index.json").unlink()
        noise(8, 8).save(parts / "grown.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"part-004.tar: cannot be read \(404 File not found\)"):
                open_source(f"{url}/part-{{000..004}}.tar")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("length", [12_000, 12_288, 12_289, 12_800, 20_000])
def test_wherever_a_tar_is_cut_that_is_noticed(photos, tmp_path, length):
    """Within a member, within a header, between the two: samples before the cut are whole, and all others lost."""
    shard(photos, tmp_path / "x.tar", rows_of(photos))
    members, fault = open_shard(tmp_path / "x.tar").members()
    data = (tmp_path / "x.tar").read_bytes()
    assert not fault and len(members) == 12 and len(data) > 30_000
    (tmp_path / "x.tar").write_bytes(data[:length])
    kept, fault = open_shard(tmp_path / "x.tar").members()
    assert "not a whole, uncompressed tar" in fault
    whole = {key: found for key, found in members.items() if all(sum(m) <= length for m in found.values())}
    assert len(whole) - 1 <= len(kept) <= len(whole) and all(kept[key] == members[key] for key in kept)
