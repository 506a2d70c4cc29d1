"""Many WebDataset shards: read a few at a time, resumed exactly, indexed once, downloaded, some broken."""

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
def cache(tmp_path, monkeypatch):
    """Use a cache folder of its own, and do not wait between attempts."""
    monkeypatch.setenv("CODI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def parts(photos, tmp_path):
    """Return the folder of four shards that hold the twelve photos."""
    return split(photos, tmp_path / "parts", 4)


def split(photos, folder, count, each=3):
    folder.mkdir()
    rows = rows_of(photos)
    for k in range(count):
        chosen = [rows[(each * k + i) % len(rows)] for i in range(each)]
        shard(photos, folder / f"part-{k:03d}.tar", chosen)
    return folder


def test_brace_patterns_are_expanded():
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    assert expand("plain{}.tar") == ["plain{}.tar"]
    refused(lambda: expand("a-{3..1}.tar"), "a-{3..1}.tar", "{1..3}")


@pytest.mark.parametrize("spec", ["x-{0..99999999}.tar", "x-" + "{0..9}" * 8 + ".tar", "x-" + "{a,b}" * 40 + ".tar"])
def test_more_shards_than_fit_the_memory_are_refused(spec):
    refused(lambda: open_source(spec), spec, "name at most 100,000 in one data set")
    assert expand("x-{0..9999999999999999999}") == ["x-0..9999999999999999999"]  # not a shard count


@pytest.mark.parametrize(
    "change",
    [
        {"members": []}, {"members": {"a": []}}, {"members": {"a": {"png": 3}}}, {"members": {"a": {"png": [0]}}},
        {"members": {"a": {"png": [-1, 2]}}}, {"members": {"a": {"png": [0, 10**9]}}}, {"members": None},
        {"members": {"a": {"png": [0.5, 2]}}}, {"members": {"a": {"png": ["0", "2"]}}}, {"fault": 3}, {"size": "x"},
        {"stamp": [1]}, None,
    ],
)  # fmt: skip
def test_a_malformed_index_is_ignored(parts, remote, cache, change):
    """A local index is built again; an uploaded one is ignored when its shard is downloaded."""
    local = read(open_source(parts), range(12), 32)
    file = parts / ".part-001.tar.index.json"
    good = json.loads(file.read_text())
    text = "[" * 50_000 if change is None else json.dumps({**good, **change})
    file.write_text(text)
    assert all(map(same, local, read(open_source(parts), range(12), 32)))
    assert json.loads(file.read_text()) == good
    fsspec.filesystem("memory").pipe("/bucket/.part-001.tar.index.json", text.encode())
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    assert not list((cache / "indexes").glob("*.uploaded"))


def test_partial_indexes_of_killed_processes_are_removed(parts):
    old, young = (parts / f".{name}.12-34.partial" for name in (".part-000.tar.index.json", ".part-001.tar.index.json"))
    for file in (old, young):
        file.write_text("half")
    os.utime(old, (0, 0))
    open_source(parts)
    assert not old.exists() and young.exists()


def test_brace_patterns_equal_the_folder(parts, tmp_path):
    a, b = open_source(parts), open_source(f"{parts}/part-{{000..003}}.tar")
    assert all(map(same, read(a, range(12), 32), read(b, range(12), 32)))
    refused(lambda: open_source(f"{parts}/part-{{003..004}}.tar"), "part-004.tar: no such file")
    refused(lambda: open_source(f"{parts}/part-{{000..001}}.zip"), "part-000.zip: not a .tar")


def test_a_shard_is_indexed_once(parts, photos, cache, monkeypatch):
    first = read(open_source(parts), range(12), 32)
    walked = []
    walk = module._walk
    monkeypatch.setattr(module, "_walk", lambda file: walked.append(file.name) or walk(file))
    assert all(map(same, first, read(open_source(parts), range(12), 32))) and not walked
    shard(photos, parts / "part-001.tar", rows_of(photos)[:5])  # another shard of the same name
    (parts / ".part-002.tar.index.json").write_text('{"stamp": ')  # a truncated index
    assert len(open_source(parts)) == 14
    assert [name[-12:] for name in sorted(walked)] == ["part-001.tar", "part-002.tar"]
    (parts / ".part-003.tar.index.json").unlink()
    (parts / ".part-003.tar.index.json").mkdir()  # the index cannot be written there
    walked.clear()
    assert len(open_source(parts)) == len(open_source(parts)) == 14
    assert len(walked) == len(list((cache / "indexes").iterdir())) == 1


def test_concurrent_readers_may_write_one_index(parts):
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: open_shard(parts / "part-000.tar").members(), range(32)))
    assert all(json.dumps(f) == json.dumps(indexes[0]) for f in indexes)
    assert [f.name for f in parts.iterdir() if f.name.startswith(".")] == [".part-000.tar.index.json"]


def test_many_shards_are_read_a_few_at_a_time(photos, tmp_path):
    source = open_source(split(photos, tmp_path / "many", FULL_SHUFFLE + 3))
    count = len(source)
    epochs = [order(source, 5, epoch) for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and list(epochs[0]) != list(epochs[1])
    for epoch in epochs:
        windows = [{i // 3 for i in epoch[at : at + 3 * WINDOW]} for at in range(0, count, 3 * WINDOW)]
        assert max(map(len, windows)) == WINDOW and sum(map(len, windows)) == FULL_SHUFFLE + 3
        assert list(epoch[: 3 * WINDOW]) != sorted(epoch[: 3 * WINDOW])
    run = list(islice(batches(source, 7, 32, seed=5), 20))  # more than an epoch
    assert [i for b in run for i in b.index][:count] == list(epochs[0])
    again = list(islice(batches(open_source(tmp_path / "many"), 7, 32, seed=5, start=63), 11))
    assert all(map(same, run[9:], again)) and [b.index for b in run[9:]] == [b.index for b in again]


def test_few_shards_are_shuffled_like_a_folder(parts, photos):
    expected = np.random.default_rng([5, 1, 0]).permutation(12).tolist()
    assert order(open_source(parts), 5, 1).tolist() == order(open_source(photos), 5, 1).tolist() == expected


def test_a_broken_shard_is_one_warning_and_its_samples_count_as_corrupt(photos, tmp_path):
    folder = split(photos, tmp_path / "many", 40)
    whole = len(open_source(folder))
    cut, gone = folder / "part-007.tar", folder / "part-009.tar"
    cut.write_bytes(cut.read_bytes()[:-12000])
    with pytest.warns(UserWarning, match=r"part-007.tar: not a whole.*lost") as caught:
        source = open_source(folder)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert len(source) == whole
    report = tmp_path / "report.json"
    stream = batches(source, 8, 32, seed=0, report=report)
    run = list(islice(stream, 15))
    stream.close()
    counts = json.loads(report.read_text())
    assert 1 <= counts["skipped"] < 3 and {f["file"] for f in counts["files"]} == {str(cut)}
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
    """Copy the shards into fsspec's memory file system, and yield their URL pattern."""
    system = fsspec.filesystem("memory")
    for path in sorted(parts.glob("*.tar")):
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket/part-{000..003}.tar"
    system.rm("/bucket", recursive=True)


def record_downloads(monkeypatch):
    names = []
    get = module.RemoteShard._get
    monkeypatch.setattr(
        module.RemoteShard, "_get", lambda self, path, to: names.append(path[-12:]) or get(self, path, to)
    )
    return names


def test_remote_shards_are_downloaded_once(parts, remote, cache, monkeypatch):
    names = record_downloads(monkeypatch)
    local = read(open_source(parts), range(12), 32)
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    assert sorted(n for n in names if n.startswith("part")) == [f"part-{k:03d}.tar" for k in range(4)]
    names.clear()
    assert all(map(same, local, read(open_source(remote), range(12), 32))) and not names
    assert len(list((cache / "shards").iterdir())) == 4


def test_least_recently_used_shards_are_evicted(parts, remote, cache, monkeypatch):
    size = max(path.stat().st_size for path in parts.glob("*.tar"))
    monkeypatch.setenv("CODI_CACHE_GB", str(2.5 * size / 1e9))
    local = read(open_source(parts), range(12), 32)
    assert all(map(same, local, read(open_source(remote), range(12), 32)))
    sizes = [file.stat().st_size for file in (cache / "shards").iterdir()]
    assert 1 < len(sizes) < 4 and sum(sizes) <= 2.5 * size


def test_the_cache_limit_holds_under_concurrent_downloads(parts, remote, cache, monkeypatch):
    size = max(path.stat().st_size for path in parts.glob("*.tar"))
    monkeypatch.setenv("CODI_CACHE_GB", str(2.5 * size / 1e9))
    barrier, get, downloaded = threading.Barrier(4), module.RemoteShard._get, set()

    def get_and_wait(self, path, to):
        get(self, path, to)
        if path not in downloaded:  # no second wait for a shard that was evicted before it was opened
            downloaded.add(path)
            barrier.wait(10)

    monkeypatch.setattr(module.RemoteShard, "_get", get_and_wait)
    with ThreadPoolExecutor(4) as pool:  # room is made for each before any is complete
        for file in pool.map(lambda name: open_shard(name).open(), expand(remote)):
            file.close()
    sizes = [file.stat().st_size for file in (cache / "shards").iterdir()]
    assert 1 <= len(sizes) < 4 and sum(sizes) <= 2.5 * size


def test_an_interrupted_download_is_retried(remote, monkeypatch):
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


def test_an_unreachable_shard_is_requested_again_after_a_pause(parts, remote, monkeypatch):
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
    assert all(isinstance(r, CorruptSample) for r in source.read(range(12), 32))  # no flood of requests
    now[0] = module.PAUSE
    assert all(map(same, local, read(source, range(12), 32)))


def test_unknown_protocols_are_refused():
    refused(lambda: open_source("nothing://x/a.tar"), "nothing://x/a.tar", "nothing")


def test_shards_are_read_over_http(parts, cache, monkeypatch):
    """At the start only the uploaded indexes are downloaded."""
    local = open_source(parts)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append((self.command, self.path))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=parts))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        source = open_source(f"{url}/part-{{000..003}}.tar")
        assert {path for command, path in requests if command == "GET"} == {
            f"/.part-{k:03d}.tar.index.json" for k in range(4)
        }
        assert not (cache / "shards").exists()
        assert all(map(same, read(local, range(12), 32), read(source, range(12), 32)))
        requests.clear()
        again = open_source(f"{url}/part-{{000..003}}.tar")
        assert all(map(same, read(local, range(12), 32), read(again, range(12), 32)))
        assert {command for command, _ in requests} == {"HEAD"}
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
def test_a_truncated_tar_is_detected_at_any_length(photos, tmp_path, length):
    """Cut within a member, within a header or between the two: samples before the cut are whole, all others lost."""
    shard(photos, tmp_path / "x.tar", rows_of(photos))
    members, fault = open_shard(tmp_path / "x.tar").members()
    data = (tmp_path / "x.tar").read_bytes()
    assert not fault and len(members) == 12 and len(data) > 30_000
    (tmp_path / "x.tar").write_bytes(data[:length])
    readable, fault = open_shard(tmp_path / "x.tar").members()
    assert "not a whole, uncompressed tar" in fault
    whole = {key: fields for key, fields in members.items() if all(sum(m) <= length for m in fields.values())}
    assert len(whole) - 1 <= len(readable) <= len(whole) and all(readable[key] == members[key] for key in readable)
