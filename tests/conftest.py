"""For every test: no network, and nothing looked up on a model hub."""

import os
import socket

import pytest

# Before any library of the hub is imported: a missing file is then an error at once, not a download.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch: threads that wait must sleep, or two processes on two cores spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let sockets reach this machine only, so that a test that needs the network fails here as it would offline."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else None  # a unix socket's address is a path
        if host not in (None, "localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to reach {host}: tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
