"""Sources of training data with one interface: folders, WebDataset tars, Hugging Face `datasets` and rendered scenes.

A source is a numbered list of samples. Reading never raises for a file that cannot be decoded: it is returned as a
`CorruptSample`, and the caller decides how many of them are too many. Faults of the data set as a whole (a missing
folder, broken metadata) raise `UserError` when the source is opened.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest, one_line
from .crops import ZOOM
from .formats import image_suffixes, list_files, list_images, read_file
from .render import COLUMNS, check_size, chunk, render_chunk
from .samples import NAMES, CorruptSample, PictureSource, Row, Sample, Source, words
from .scenes import SPLITS
from .shards import expand
from .tars import TarSource
from .text_files import METADATA, decode_text, read_rows

SCHEMES = ("scenes", "datasets")
CAPTION = ".txt"  # key of the caption file among the files of a sample
SCENE_COUNTS = {"train": 20_000, "held-out": 500, "composition": 500}


def open_source(
    spec: str | Path,
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
    zoom: tuple[float, float] | None = None,
) -> Source:
    """Open training data.

    `spec` is one of: a folder (Hugging Face imagefolder: pictures, in sub-folders too, and optionally metadata.jsonl
    or metadata.csv with `file_name`, `text`, `instruction` and further pictures by names such as `mask_file_name`, or
    captions as .txt files beside the pictures); WebDataset shards (a .tar, a glob, a folder of them, or paths or URLs
    with braces, `https://host/train-{0000..0999}.tar`); `scenes:SPLIT[:COUNT[:SEED]]`; `datasets:NAME` (train split of
    a `datasets` data set).
    `columns` names the image columns to read into `extras`, e.g. `("mask",)`; every sample must have these, and may
    have those in `optional`. In a tar, column `mask` is member KEY.mask.png. `zoom` is the range of random crops (see
    crops.draw_square); None: 1 to 2.
    Raises UserError for data that is missing, empty or malformed, and for a zoom with scenes.
    """
    source = _open(str(spec), columns, optional)
    if zoom is not None and tuple(zoom) != ZOOM:
        if not isinstance(source, PictureSource):
            raise UserError(f"zoom {zoom[0]:g} to {zoom[1]:g}: {spec} is rendered at the training size: leave zoom out")
        source.zoom = (zoom[0], zoom[1])
    return source


def _open(spec: str, columns: Sequence[str], optional: Sequence[str]) -> Source:
    path = Path(spec)
    if not path.exists():
        names = expand(spec)
        if "://" in spec or len(names) > 1:
            return _open_shards(spec, names, columns, optional)
        scheme, colon, rest = spec.partition(":")
        if colon and scheme == "scenes":
            return _open_scenes(spec, rest, [*columns, *(c for c in optional if c in COLUMNS)])
        if colon and scheme == "datasets":
            return DatasetsSource(rest, columns, optional)
        if colon and re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
            hint = nearest(scheme, SCHEMES)
            raise UserError(f"{spec}: unknown scheme {scheme!r}{hint}: give a folder, .tar files, scenes: or datasets:")
        shards = sorted(Path(p) for p in glob.glob(spec))
        if shards:
            return TarSource(spec, shards, columns, optional)
        raise UserError(f"{spec}: no such file or folder: give a folder of pictures, .tar files or scenes:SPLIT")
    if path.is_file():
        if path.suffix != ".tar":
            raise UserError(
                f"{spec}: neither a folder nor a .tar: give a folder of pictures, .tar files or scenes:SPLIT"
            )
        return TarSource(spec, [path], columns, optional)
    shards = sorted(path.glob("*.tar"))
    if shards and not any((path / name).exists() for name in METADATA) and not list_images(path):
        return TarSource(spec, shards, columns, optional)
    return FolderSource(path, columns, optional)


def _open_shards(spec: str, names: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> TarSource:
    for name in names:
        if not name.partition("?")[0].endswith(".tar"):
            raise UserError(f"{name}: not a .tar: name WebDataset shards, as in train-{{0000..0999}}.tar")
        if "://" not in name and not Path(name).is_file():
            raise UserError(f"{name}: no such file: restore it, or leave it out of {spec}")
    return TarSource(spec, names, columns, optional)


class FolderSource(PictureSource):
    """A folder of images, sub-folders included.

    The samples are the lines of metadata.jsonl or metadata.csv, in their order (in any sub-folder; file names are
    relative to the metadata file); without metadata, all images, sorted. If a sample has no text, a .txt file with the
    same name as its image provides it.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
        self.folder, self.columns, self.optional = folder, tuple(columns), tuple(optional)
        files = list_files(folder, below=True)
        self.metadata = [path for path in files if path.name in METADATA]
        for path in files:
            if path.name == "metadata.parquet":
                raise UserError(f"{path}: cannot be read here: give datasets:{folder}, or write metadata.jsonl")
        for one, two in pairwise(self.metadata):
            if one.parent == two.parent:
                raise UserError(f"{two}: the folder also has {one.name}: keep one of them")
        self._rows: list[tuple[str, str, str, dict[str, str]]] = []  # image, text, instruction, other files
        for path in self.metadata:
            self._rows.extend(self._read_metadata(path))
        if not self.metadata:
            if columns:
                raise UserError(
                    f"{folder}: no metadata.jsonl, so no {columns[0]}: add one with a line for each picture"
                )
            suffixes = frozenset(image_suffixes())
            self._rows = [(str(p), "", "", {}) for p in files if p.suffix.lower() in suffixes]
        if not self._rows:
            raise UserError(f"{folder}: no pictures in it: put PNG, JPEG, WebP or other pictures there")
        for image, text, _, others in self._rows:
            if not text and os.path.isfile(caption := f"{os.path.splitext(image)[0]}.txt"):
                others[CAPTION] = caption

    def _read_metadata(self, metadata: Path) -> Iterator[tuple[str, str, str, dict[str, str]]]:
        """Yield the image, text, instruction and other files (column -> path) of each row of a metadata file."""
        folder = str(metadata.parent)
        for where, row in read_rows(metadata):
            if not isinstance(row.get("file_name"), str):
                raise UserError(f'{where} has no file_name: write {{"file_name": "a.png", "text": "..."}}')
            files = {"image": os.path.join(folder, row["file_name"])}
            for column in (*self.columns, *self.optional):
                name = file_of(row, column)
                if name is not None:
                    files[column] = os.path.join(folder, name)
                elif column in self.columns:
                    raise UserError(f"{where} has no {column}: name the file as {column}_file_name")
            for column, file in list(files.items()):
                if os.path.isfile(file):
                    continue
                if column not in self.optional:
                    name = os.path.relpath(file, folder)
                    raise UserError(f"{where} names {name}, which is missing: restore it or drop the line")
                del files[column]
            yield files.pop("image"), words(row, "text", where), words(row, "instruction", where), files

    def unused(self) -> list[str]:
        if not self.metadata:
            return []
        referenced = {
            os.path.normpath(os.path.join(path.parent, value))
            for path in self.metadata
            for _, row in read_rows(path)
            for value in row.values()
            if isinstance(value, str)
        }
        return [
            str(p.relative_to(self.folder)) for p in list_images(self.folder, below=True) if str(p) not in referenced
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self) -> str:
        count = sum(CAPTION in files for *_, files in self._rows)
        captions = self.metadata[0].name if self.metadata else f"{count:,} with captions" if count else "no captions"
        return f"{self.folder}: {len(self):,} pictures, {captions}"

    def name(self, index: int) -> str:
        path = Path(self._rows[index][0])  # metadata may hold absolute paths outside the folder
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)

    def row(self, index: int) -> Row:
        image, text, instruction, files = self._rows[index]
        data = {column: read_file(Path(file)) for column, file in files.items()}
        if CAPTION in data:
            text = decode_text(data.pop(CAPTION), f"its {Path(files[CAPTION]).name}").strip()
        return Row(read_file(Path(image)), text, instruction, data)


def file_of(row: dict[str, Any], column: str) -> str | None:
    """Return a row's file name for a column, from the key `mask_file_name` (as in `datasets`) or else `mask`."""
    keys = (key for name in NAMES.get(column, (column,)) for key in (f"{name}_file_name", name))
    return next((row[key] for key in keys if isinstance(row.get(key), str) and row[key]), None)


class DatasetsSource(PictureSource):
    """The train split of a data set of the Hugging Face `datasets` library, with columns `image`, `text` and
    `instruction`, or other common names for them (see NAMES)."""

    def __init__(self, dataset: str, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(f"datasets:{dataset}: the datasets library is missing: pip install datasets") from None
        try:
            self._table: Any = datasets.load_dataset(dataset, split="train")
        except Exception as error:  # missing name, network or script errors all have different types
            why = one_line(error)
            raise UserError(f"datasets:{dataset}: cannot be loaded ({why}): check the name and the network") from None
        self.dataset, has = dataset, self._table.column_names
        self._names = {  # column -> its name in this data set
            column: name
            for column in ("image", "text", "instruction", *columns, *optional)
            if (name := next((n for n in _hub_names(column) if n in has), None)) is not None
        }
        for column in ("image", *columns):
            if column not in self._names:
                raise UserError(f"datasets:{dataset}: no column {column}: it has {', '.join(has)}")
        self.needed, self.columns = ("image", *columns), [c for c in (*columns, *optional) if c in self._names]
        for column in ("image", *self.columns):
            self._require_pictures(self._names[column])
            self._table = self._table.cast_column(self._names[column], datasets.Image(decode=False))
        for column in ("text", "instruction"):
            self._require_text(self._names.get(column))
        if not len(self._table):
            raise UserError(f"datasets:{dataset}: holds no rows: give another data set")

    def _require_pictures(self, name: str) -> None:
        feature = self._table.features[name]
        kind = getattr(feature, "dtype", type(feature).__name__)
        stored = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
        if type(feature).__name__ != "Image" and not stored and "binary" not in str(kind):
            fix = "cast it to datasets.Image"
            if "string" in str(kind):
                fix = f"of a folder, write the key {name}_file_name in its metadata; elsewhere {fix}"
            raise UserError(f"datasets:{self.dataset}: {name} is not an image column, it holds {kind}: {fix}")

    def _require_text(self, name: str | None) -> None:
        feature = self._table.features[name] if name else None
        if name and "string" not in str(getattr(feature, "dtype", "")):
            kind = one_line(feature, 80)
            raise UserError(f"datasets:{self.dataset}: {name} is not a text column, it holds {kind}: map it to strings")

    def __len__(self) -> int:
        return len(self._table)

    def describe(self) -> str:
        return f"datasets:{self.dataset}: {len(self):,} pictures"

    def name(self, index: int) -> str:
        return f"datasets:{self.dataset}[{index}]"

    def row(self, index: int) -> Row:
        stored = self._table[index]
        row, data = {column: stored[name] for column, name in self._names.items()}, {}
        for column in ("image", *self.columns):
            if row[column] is not None:
                data[column] = row[column]["bytes"] or read_file(Path(row[column]["path"]))
            elif column in self.needed:
                raise ValueError(f"it has no {column}")
        return Row(data.pop("image"), row.get("text") or "", row.get("instruction") or "", data)


def _hub_names(column: str) -> tuple[str, ...]:
    """Return the names of a column in data sets of the Hugging Face Hub, our own name first."""
    names = NAMES.get(column, (column,))
    # InstructPix2Pix has instructions in "edit"; our metadata has the kind of edit there, so NAMES omits it.
    return (*names, "edit") if column == "instruction" else names


def _open_scenes(spec: str, rest: str, columns: Sequence[str]) -> SceneSource:
    split, *numbers = rest.split(":")
    if split not in SPLITS:
        raise UserError(f"{spec}: unknown split {split!r}{nearest(split, SPLITS)}: use one of {', '.join(SPLITS)}")
    if len(numbers) > 2 or not all(re.fullmatch(r"-?\d+", n) for n in numbers):
        raise UserError(f"{spec}: COUNT and SEED are whole numbers: write scenes:SPLIT:COUNT:SEED")
    count, seed = [*map(int, numbers), *(SCENE_COUNTS[split], 0)[len(numbers) :]]
    if count < 1 or seed < 0:
        raise UserError(
            f"{spec}: a count of at least 1 and a seed of at least 0 are needed: write scenes:{split}:500:0"
        )
    for column in columns:
        if column not in COLUMNS:
            raise UserError(f"{spec}: scenes have no {column}{nearest(column, COLUMNS)}: they have {COLUMNS}")
    return SceneSource(split, count, seed, columns)


class SceneSource:
    """Scenes of `data.scenes`, rendered when first read and cached (up to `memory` bytes): the data of `codi data
    render`, without files. `conditioning_image` is depth in millimeters, `mask` instance ids."""

    def __init__(
        self, split: str, count: int, seed: int = 0, columns: Sequence[str] = (), memory: int = 1 << 30
    ) -> None:
        self.split, self.count, self.seed, self.columns = split, count, seed, tuple(columns)
        self._memory_left = memory
        self.device = "cpu"  # renders there; other devices round a few pixels differently
        self._cache: dict[tuple[int, int], Sample] = {}  # (size, index) -> sample with integer tensors

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        return f"scenes: {self.count:,} of {self.split}, seed {self.seed}"

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """Read samples as `Source.read` does; `crops` has no effect, since scenes are rendered at any size. Raises
        UserError for a size that the ray caster does not support."""
        check_size(size)
        fresh: dict[int, Sample] = {}
        missing = [i for i in dict.fromkeys(indices) if (size, i) not in self._cache]
        step = chunk(size, self.device)
        for start in range(0, len(missing), step):
            for sample in self._render(missing[start : start + step], size):
                fresh[sample.index] = sample
                self._add_to_cache(sample, size)
        return [self._finish(fresh[i] if i in fresh else self._cache[size, i]) for i in indices]

    def _render(self, indices: Sequence[int], size: int) -> Iterator[Sample]:
        out = render_chunk(self.split, indices, size, self.seed, "edited_image" in self.columns, self.device)
        for k, i in enumerate(indices):
            # Cloned, because a slice would keep the whole chunk in memory.
            extras = {c: out.columns[c][k].clone() for c in self.columns}
            name, caption, instruction = f"scenes:{self.split}[{i}]", out.scenes[k].caption, out.edits[k].instruction
            yield Sample(i, name, out.image[k].clone(), caption, instruction, extras)

    def _add_to_cache(self, sample: Sample, size: int) -> None:
        num_bytes = sum(t.numel() * t.element_size() for t in (sample.image, *sample.extras.values())) + 2048
        if num_bytes <= self._memory_left:
            self._memory_left -= num_bytes
            self._cache[size, sample.index] = sample

    @staticmethod
    def _finish(cached: Sample) -> Sample:
        """Convert the integer tensors of a cached sample to float."""
        extras = {c: t.float() / 255 if c == "edited_image" else t.float() for c, t in cached.extras.items()}
        return replace(cached, image=cached.image.float() / 255, extras=extras)
