"""Shared fixtures; no test may use the network or a model hub."""

import json
import os
import socket

import pytest

# Set before hub libraries are imported: a missing file is an error instead of a download.
os.environ["HF_HUB_OFFLINE"] = "1"
# Set before torch is imported: one thread per process, as processes share the cores (`make test`) and models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Allow connections to this machine only, so that a test that needs the network fails."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else None  # a unix socket's address is a path
        if host not in (None, "localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to reach {host}: tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


# Fixtures import heavy modules themselves, so that tests without models start fast.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a tiny backbone and an upscaler for it."""
    from shell import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def shell(capsys):
    """A Shell that runs commands in this process."""
    from shell import Shell

    return Shell(capsys)


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve captioned images of different sizes; metadata order differs from name order."""
    from folders import noise

    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    lines = []
    for i in (*range(6, 12), *range(6)):
        name = f"sub/{i:02d}.png" if i % 2 else f"{i:02d}.png"
        noise(40 + 5 * i, 50 + 3 * i, i).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {i}", "instruction": f"do {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def rendered(tmp_path):
    """A folder of six rendered scenes."""
    from codi.data.render import render_folder

    render_folder(6, tmp_path / "rendered", size=32, seed=1)
    return tmp_path / "rendered"
