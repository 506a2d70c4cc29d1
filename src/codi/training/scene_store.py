"""Rendered scenes stored on disk: rendering an image of 128 px costs about as much as training on it once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.render import check_size, chunk, render_chunk
from ..data.samples import CorruptSample, Sample
from ..data.scenes import sample_edit, sample_scene
from ..data.sources import SceneSource, Source


class StoredScenes(SceneSource):
    """Source of scenes that are rendered when first read and then kept in memory-mapped files below `folder`.

    Any number of processes and later runs share the files of a split, seed and size, and a later run may use more
    scenes. Of `columns` only `edited_image` is supported. Images are uint8 (N, 3, S, S); a byte per scene records
    whether it has been rendered.
    """

    def __init__(self, source: SceneSource, folder: Path) -> None:
        super().__init__(source.split, source.count, source.seed, source.columns)
        self.device, self.folder = source.device, Path(folder)
        self._files: dict[str, np.memmap] = {}

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """Read scenes as `SceneSource.read` does. Raises UserError for a size that cannot be rendered."""
        files = self._rendered(indices, size)
        return [self._sample(i, files) for i in indices]

    def crops(self, indices: Sequence[int], size: int, corners: Sequence[tuple[int, int]], crop: int) -> torch.Tensor:
        """Return crops of the scenes at `indices`, uint8 (B, 3, crop, crop). `corners`: top and left of each crop."""
        image = self._rendered(indices, size)["image"]
        squares = [image[i, :, y : y + crop, x : x + crop] for i, (y, x) in zip(indices, corners, strict=True)]
        return torch.from_numpy(np.stack(squares))

    def _rendered(self, indices: Sequence[int], size: int) -> dict[str, np.ndarray]:
        """Return the files of all columns, (N, 3, S, S), after rendering the scenes at `indices` that they lack."""
        check_size(size)
        names = ["image", *self.columns]
        files = {name: self._map(name, size, 3 * size * size).reshape(-1, 3, size, size) for name in names}
        done = {name: self._map(f"{name}-done", size, 1) for name in names}
        missing = [i for i in dict.fromkeys(indices) if not all(d[i] for d in done.values())]
        step = chunk(size, self.device)
        for at in range(0, len(missing), step):
            part = missing[at : at + step]
            out = render_chunk(self.split, part, size, self.seed, "edited_image" in names, self.device)
            for name, file in files.items():
                file[part] = (out.image if name == "image" else out.columns[name]).numpy()
                done[name][part] = 1
        return files

    def _sample(self, index: int, files: dict[str, np.ndarray]) -> Sample:
        scene = sample_scene(self.seed, self.split, index)
        image, *rest = (torch.from_numpy(file[index].copy()).float() / 255 for file in files.values())
        edit = sample_edit(scene, self.seed, self.split, index).instruction if rest else ""
        extras = dict(zip(self.columns, rest, strict=True))
        return Sample(index, f"scenes:{self.split}[{index}]", image, scene.caption, edit, extras)

    def _map(self, name: str, size: int, length: int) -> np.memmap:
        """Map the file `name` of `size`, uint8 with `length` bytes per scene, created or extended with zeros."""
        path = self.folder / f"{self.split}-{self.seed}-{size}-{name}.u8"
        if path.name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:  # a sparse file: unrendered scenes take no space
                if file.tell() < self.count * length:
                    file.truncate(self.count * length)
            self._files[path.name] = np.memmap(path, dtype=np.uint8, mode="r+", shape=(self.count, length))
        return self._files[path.name]


def stored(source: Source, folder: str | Path | None) -> Source:
    """Return `source` with its images stored below `folder` if it renders scenes and a folder is given."""
    if folder is None or not isinstance(source, SceneSource):
        return source
    return StoredScenes(source, Path(folder))
