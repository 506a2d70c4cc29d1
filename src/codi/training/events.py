"""What a run tells the world: TensorBoard scalars, one JSON line a report, and a progress line with an ETA."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from .checkpoint import Progress


class Events:
    """Writes below `out`: `tensorboard/` and `log.jsonl`. The x-axis is training images everywhere."""

    def __init__(self, out: Path, total: int, start: Progress, quiet: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self.total, self.quiet = total, quiet
        self.start, self.began = start.images, time.monotonic()
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start.images or None)
        self.log = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - open for the run

    def scalars(self, progress: Progress, values: dict[str, float]) -> None:
        """Records `values`; prints one line with rate and time left."""
        for name, value in values.items():
            self.board.add_scalar(name, value, progress.images)
        row = {"images": progress.images, "seconds": round(progress.seconds, 1), **values}
        try:
            self.log.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk: an open file's error does not name it
            error.filename = self.log.name
            raise
        if self.quiet:
            return
        rate = (progress.images - self.start) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - progress.images) / max(rate, 1e-9)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(
            f"{progress.images:>9,}/{self.total:,} images  {rate:6.1f}/s  {left / 60:5.1f} min left  {shown}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Flushes and closes the files."""
        self.board.close()
        self.log.close()
