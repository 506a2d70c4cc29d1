"""Split a folder into at most 4 files of 16 MiB, and restore it.

    python gpu/shards.py pack FOLDER TARGET       TARGET/shard-0.bin ...
    python gpu/shards.py unpack SOURCE FOLDER

The shards form an uncompressed tar: float16 weights do not compress.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

SHARD = 16 * 2**20 - 4096
MOST = 4


def pack(folder: Path, target: Path) -> list[Path]:
    """Write the shards. Raises ValueError if the folder is too large for them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    data = buffer.getvalue()
    if len(data) > SHARD * MOST:
        raise ValueError(f"{folder}: {len(data) / 2**20:.0f} MiB does not fit {MOST} shards of 16 MiB")
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("shard-*.bin"):  # a previous call may have written more
        old.unlink()
    shards = []
    for number, start in enumerate(range(0, len(data), SHARD)):
        shards.append(target / f"shard-{number}.bin")
        shards[-1].write_bytes(data[start : start + SHARD])
    return shards


def unpack(source: Path, folder: Path) -> None:
    """Join SOURCE/shard-*.bin and unpack them into `folder`."""
    data = b"".join(path.read_bytes() for path in sorted(source.glob("shard-*.bin")))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


if __name__ == "__main__":
    verb, first, second = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[verb](Path(first), Path(second))
