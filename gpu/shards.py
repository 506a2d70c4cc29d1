"""Cuts a folder into files small enough to carry (16 MiB each, 4 in all) and puts it together again.

    python gpu/shards.py pack FOLDER TARGET       TARGET/shard-0.bin ...
    python gpu/shards.py unpack SOURCE FOLDER

What is packed is an uncompressed tar: float16 weights do not compress.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

SHARD = 16 * 2**20 - 4096
MOST = 4


def pack(folder: Path, target: Path) -> list[Path]:
    """Writes the shards; raises ValueError where the folder is too large for them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    data = buffer.getvalue()
    if len(data) > SHARD * MOST:
        raise ValueError(f"{folder}: {len(data) / 2**20:.0f} MiB does not fit {MOST} shards of 16 MiB")
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("shard-*.bin"):  # there may have been more of them
        old.unlink()
    shards = []
    for number, start in enumerate(range(0, len(data), SHARD)):
        shards.append(target / f"shard-{number}.bin")
        shards[-1].write_bytes(data[start : start + SHARD])
    return shards


def unpack(source: Path, folder: Path) -> None:
    """Joins SOURCE/shard-*.bin and unpacks them into `folder`."""
    data = b"".join(path.read_bytes() for path in sorted(source.glob("shard-*.bin")))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


if __name__ == "__main__":
    verb, first, second = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[verb](Path(first), Path(second))
