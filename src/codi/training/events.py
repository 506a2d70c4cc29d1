"""Log of a run: TensorBoard scalars, a JSON line per report, and a progress line with the time left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from .checkpoint import Progress


class Events:
    """Writer of `tensorboard/` and `log.jsonl` below `out`. The x-axis is training images everywhere."""

    def __init__(self, out: Path, total: int, start: Progress, quiet: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self.total, self.quiet = total, quiet
        self.start, self.began = start.images, time.monotonic()
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start.images or None)
        self.log = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - open during the run

    def scalars(self, progress: Progress, values: dict[str, float]) -> None:
        """Record `values`; print a line with the rate and the time left."""
        for name, value in values.items():
            self.board.add_scalar(name, value, progress.images)
        row = {"images": progress.images, "seconds": round(progress.seconds, 1), **values}
        try:
            self.log.write(json.dumps(row) + "\n")
        except OSError as error:  # such as a full disk: name the file, which the error lacks
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
        """Flush and close the files."""
        self.board.close()
        self.log.close()
