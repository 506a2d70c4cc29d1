"""Upscalers and inpainters side by side on real photographs, whole pictures, on the CPU.

    python benchmarks/photographs.py --set14 DIR --ours NAME=ADAPTER[@MODEL] --baselines bicubic --out results.json
    ... --bsd100 DIR --val FILE.tar --baselines bicubic realesrgan esrgan --realesrgan FOLDER --esrgan FOLDER
    ... --inpaint NAME=ADAPTER[@MODEL] --steps 1 4 --degradations bicubic real --count 20 --sheet sheet.png

Upscaling x4: a photograph, cropped to multiples of 16 px, is made small once for each degradation, `bicubic` or `real`
(of a seed of its own), and every method gets that picture, whole: ours through the pipeline as users call it, which
tiles what is large. Inpainting: the centre of 256 px with a hole, `boxes` or `strokes`, as training draws them; ours
gets the caption where a set has captions, OpenCV's Telea and Navier-Stokes take none. Where the weights of the
baselines come from, baselines.py says; rows.py, what the figures in --out are.

What --out holds already is not measured again, unless the method's weights or what it is given changed; other methods'
rows stay. Changes of code are not noticed: name another --out then. --sheet sheet.png writes sheet-SET-KIND.png; the
parts it is made of stay in the folder sheet-parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from baselines import ESRGAN, OPENCV, RADIUS, RealESRGAN, fill
from command import command_line, public
from rows import Told, forget, line, opened, rows
from torch import Tensor

from codi.data.batches import Batch
from codi.data.crops import why_unreadable
from codi.data.images import read_image, write_image
from codi.data.samples import PictureSource
from codi.data.sources import open_source
from codi.errors import UserError
from codi.evaluation.evaluate import describe_machine, pipeline_method, sample_seeds
from codi.evaluation.metrics import default_features, enlite0_distance, maps_distance, psnr, ssim
from codi.evaluation.report import contact_sheet, write_json
from codi.models.backbones import digest
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import Task
from codi.tasks.base import seeds
from codi.tasks.inpaint import Inpaint
from codi.tasks.masks import DRAW
from codi.tasks.upscale import DEGRADATIONS, Upscale

SETS = ("set14", "bsd100", "val")
BASELINES = ("bicubic", "realesrgan", "esrgan")
HOLES = ("boxes", "strokes")
SCALE, MULTIPLE = 4, 16
SIDE, SHOWN = 256, 6  # pixels of what is inpainted, and of the parts that sheets show; pictures on a sheet
PATCH = 224  # pixels: the feature network's own size


@dataclass(frozen=True)
class Entrant:
    """A method at one number of steps. `make(given (1, C, h, w), prompt, seed)` is a picture (1, 3, H, W) in [0, 1];
    `told`, JSON-able, what its pictures depend on beside that."""

    label: str
    make: Callable[[Tensor, str, int], Tensor]
    told: Told


@dataclass(frozen=True)
class Contest:
    """One task on one kind of input. `given(batch, generator)` makes what all entrants get, (1, C, h, w), of the true
    picture, whose sides are at most `most` px (None: as they are)."""

    kind: str
    task: Task
    given: Callable[[Batch, torch.Generator], Tensor]
    entrants: list[Entrant]
    most: int | None = None


@dataclass(frozen=True)
class Photograph:
    """One of a set: its position there, name, pixels (3, H, W) in [0, 1] and caption, "" for none."""

    position: int
    name: str
    rgb: Tensor
    text: str = ""


# --- what is measured ----------------------------------------------------------------------------------------------


def photographs(spec: str, count: int | None) -> Iterator[Photograph]:
    """The first `count` of a folder or tar, whole. Raises UserError for one that cannot be read."""
    source = open_source(spec)
    if not isinstance(source, PictureSource):
        raise UserError(f"{spec}: holds no files: name a folder of pictures or a .tar")
    for position in range(min(len(source), count or len(source))):
        name = Path(source.name(position)).name
        try:
            row = source.row(position)
            picture, _ = source.decode(row)
        except Exception as error:  # as PictureSource._read: decoders raise nearly every type there is
            raise UserError(f"{name}: {why_unreadable(error)}: copy it again, or take it out of the set") from error
        rgb = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        yield Photograph(position, name, rgb, row.text)


def centred(image: Tensor, most: int | None = None) -> Tensor:
    """The centre of (..., H, W), its sides multiples of MULTIPLE and at most `most`."""
    height, width = (min(side // MULTIPLE * MULTIPLE, most or side) for side in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def with_hole(batch: Batch, generator: torch.Generator, kind: str) -> Tensor:
    """The picture and a mask of one kind, (1, 4, H, W): as the task draws them, but for the few that cover all of the
    picture or none, which nothing can be compared on."""
    height, width = batch.image.shape[-2:]
    mask = DRAW[kind](height, width, np.random.default_rng(seeds(batch, generator)[0]))
    return torch.cat([batch.image, torch.from_numpy(mask)[None, None]], 1)


def patch_distance(output: Tensor, truth: Tensor) -> Tensor:
    """Mean ENLite0 distance (1,) of the patches of PATCH px that cover (1, 3, H, W), evenly spread."""
    side = min(PATCH, *truth.shape[-2:])
    tops, lefts = (np.linspace(0, x - side, -(-x // side)).round().astype(int) for x in truth.shape[-2:])
    corners = [(y, x) for y in tops for x in lefts]
    cut = [torch.cat([image[..., y : y + side, x : x + side] for y, x in corners]) for image in (output, truth)]
    return enlite0_distance(*cut).mean(0, keepdim=True)


def figures(output: Tensor, batch: Batch, given: Tensor, task: Task) -> dict[str, float]:
    """Of one picture; those of the task's obedience that it has none of are left out."""
    features, truth = default_features(), batch.image
    found = {"psnr": psnr(output, truth), "ssim": ssim(output, truth)}
    found["distance"] = maps_distance(features(output), features(truth))
    found["patch_distance"] = patch_distance(output, truth)
    found |= task.obedience(output, given, batch)
    return {name: float(value) for name, value in found.items() if not value.isnan()}


# --- who takes part ------------------------------------------------------------------------------------------------


def ours(task: str, word: str, steps: Sequence[int]) -> list[Entrant]:
    """NAME=ADAPTER[@MODEL] at each number of steps. Raises UserError for what is not there or enlarges otherwise."""
    name, equals, rest = word.partition("=")
    adapter, _, model = rest.partition("@")
    if not (equals and name and adapter):
        raise UserError(f"{word}: not NAME=ADAPTER[@MODEL]: name an embedded adapter or the folder of one")
    pipe = CoDiPipeline.from_pretrained(model or "mini", task=task, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    if task == "upscale" and pipe.task.scale != SCALE:  # type: ignore[union-attr]
        raise UserError(f"{word}: this adapter does not enlarge {SCALE} times: name one that does")
    parts = {"codec": pipe.vae, "decoder": pipe.tiny_vae, "unet": pipe.student.network, "adapter_weights": pipe.adapter}
    told = {"adapter": public(adapter), "model": public(model or "mini")}
    told |= {part: digest(module) for part, module in parts.items() if module is not None}
    method = pipeline_method(pipe, steps, name)

    def make(given: Tensor, prompt: str, seed: int, steps: int) -> Tensor:
        return method.run(given, [prompt], steps, [seed])

    return [Entrant(f"{name} · {n}", partial(make, steps=n), {**told, "steps": n}) for n in steps]


def plain(label: str, function: Callable[[Tensor], Tensor], told: Told | None = None) -> Entrant:
    """A method that takes neither prompt nor seed."""
    return Entrant(label, lambda given, prompt, seed: function(given), told or {})


def upscalers(args: argparse.Namespace) -> list[Entrant]:
    """The baselines that are asked for, then ours. Raises UserError where one is missing."""
    found = []
    for name in args.baselines:
        if name == "bicubic":
            found.append(plain(name, Upscale(SCALE).condition))
        else:
            net = ESRGAN(args.esrgan) if name == "esrgan" else RealESRGAN(args.realesrgan, args.threads)
            found.append(plain(name, net, net.settings))
    return found + [entrant for word in args.ours for entrant in ours("upscale", word, args.steps)]


def inpainters(args: argparse.Namespace) -> list[Entrant]:
    """OpenCV's two, then ours."""
    filled = [plain(name, partial(fill, method=name), {"radius": RADIUS}) for name in OPENCV]
    return filled + [entrant for word in args.inpaint for entrant in ours("inpaint", word, args.steps)]


def contests(args: argparse.Namespace) -> list[Contest]:
    """What the options ask for: upscaling unless only --inpaint is given."""
    found = []
    if args.ours or args.baselines:
        entrants = upscalers(args)
        for kind in args.degradations:
            task = Upscale(SCALE, kind)
            found.append(Contest(kind, task, task.given, entrants))
    if args.inpaint:
        entrants = inpainters(args)
        found += [Contest(kind, Inpaint((kind,)), partial(with_hole, kind=kind), entrants, SIDE) for kind in HOLES]
    for contest in found:
        labels = [entrant.label for entrant in contest.entrants]
        if len(set(labels)) < len(labels):
            raise UserError(f"{', '.join(labels)}: two of one name: give each its own")
    return found


# --- measuring -----------------------------------------------------------------------------------------------------


class Bench:
    """Measures what `told`, the content of --out, lacks, and keeps what sheets show in the folder `parts`."""

    def __init__(self, told: Told, seed: int, parts: Path | None = None) -> None:
        self.told, self.seed, self.parts = told, seed, parts
        self.warm: set[int] = set()
        self.columns: dict[str, dict[str, list[Tensor]]] = {}  # of each contest's sheet

    @torch.inference_mode()
    def measure(self, name: str, contest: Contest, number: int, photograph: Photograph) -> None:
        """One photograph, of the set with this number, by all entrants, into told["contests"][name]."""
        truth = centred(photograph.rgb, contest.most)[None].contiguous()
        batch = Batch(truth, [photograph.text], index=[photograph.position])
        # Its own stream, or its noise would equal the sampler's.
        key = np.random.SeedSequence([self.seed, number, photograph.position]).generate_state(1, np.uint64)[0]
        given = contest.given(batch, torch.Generator().manual_seed(int(key >> np.uint64(1))))
        levels = [(image * 255).round().byte().numpy().tobytes() for image in (given, truth)]
        same = hashlib.sha256(b"".join(levels)).hexdigest()[:12]
        entry = self.told["contests"].setdefault(name, {"task": contest.task.name, "pictures": {}})
        record = entry["pictures"].get(photograph.name)
        if record is None or record["digest"] != same:
            record = {"size": [truth.shape[-1], truth.shape[-2]], "digest": same, "figures": {}}
            entry["pictures"][photograph.name] = record
        shown = {"given": shown_part(given if given.shape[1] == 3 else contest.task.condition(given)[:, :3], truth)}
        for entrant in contest.entrants:
            part = self._part(name, entrant, record) if photograph.position < SHOWN else None
            if entrant.label not in record["figures"] or (part and not part.is_file()):
                output, seconds = self._timed(entrant, contest, batch, given)
                record["figures"][entrant.label] = figures(output, batch, given, contest.task) | seconds
                if part:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    write_image(part, shown_part(output, truth), overwrite=True)
            if part:
                shown[entrant.label] = read_image(part).rgb
        if self.parts and photograph.position < SHOWN:
            for label, picture in {**shown, "truth": shown_part(truth, truth)}.items():
                self.columns.setdefault(name, {}).setdefault(label, []).append(picture)

    def _timed(
        self, entrant: Entrant, contest: Contest, batch: Batch, given: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        prompt, seed = contest.task.prompts(batch)[0], sample_seeds(self.seed, batch.index)[0]
        if id(entrant) not in self.warm:  # the first call allocates
            entrant.make(given[..., :32, :32].contiguous(), prompt, seed)
            self.warm.add(id(entrant))
        clock, cpu = time.perf_counter(), time.process_time()
        output = entrant.make(given, prompt, seed)
        seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        if output.shape != batch.image.shape:
            raise ValueError(f"{entrant.label}: made {tuple(output.shape)}, the truth is {tuple(batch.image.shape)}")
        if not output.isfinite().all():
            raise UserError(f"{entrant.label}: made a picture with non-finite values: check its weights")
        return output.clone().float().clamp(0, 1), seconds

    def _part(self, name: str, entrant: Entrant, record: Told) -> Path | None:
        """Where the part of a picture that sheets show lies: a file of another method or input has another name."""
        if not self.parts:
            return None
        key = zlib.crc32(json.dumps([entrant.label, entrant.told, record["digest"]]).encode())
        return self.parts / name.replace("/", "-") / f"{key:08x}.png"


def shown_part(image: Tensor, truth: Tensor) -> Tensor:
    """The centre of (1, 3, h, w), SIDE px of `truth`; black where it has fewer. A smaller image's part is smaller."""
    ratio = truth.shape[-1] // image.shape[-1]
    side = SIDE // ratio
    height, width = (min(side, extent) for extent in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    above, before = (side - height) // 2, (side - width) // 2
    part = image[0, :, top : top + height, left : left + width]
    return F.pad(part, (before, side - width - before, above, side - height - above))


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures picture by picture; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SETS:
        parser.add_argument(f"--{name}", help="folder of pictures, or a .tar of them")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=ADAPTER[@MODEL]", help="upscalers")
    parser.add_argument("--inpaint", nargs="*", default=[], metavar="NAME=ADAPTER[@MODEL]", help="inpainters")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--baselines", nargs="*", default=[], choices=BASELINES, help="upscalers")
    parser.add_argument("--realesrgan", type=Path, help="folder of realesrgan-x4plus.param and .bin")
    parser.add_argument("--esrgan", type=Path, help="folder of model.json")
    parser.add_argument("--degradations", nargs="+", default=["bicubic", "real"], choices=DEGRADATIONS)
    parser.add_argument("--count", type=int, help="the first pictures of each set; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="a .png, in whose place one is written for each contest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """What the options say. Raises UserError for what a user can mend."""
    told = opened(args.out, {"seed": args.seed, "threads": args.threads})
    asked, sets = contests(args), {name: getattr(args, name) for name in SETS if getattr(args, name)}
    if not asked or not sets:
        raise UserError("nothing to measure: give a set, and some of --ours, --baselines, --inpaint")
    for contest in asked:
        forget(told, contest.task.name, {entrant.label: entrant.told for entrant in contest.entrants})
    bench = Bench(told, args.seed, args.sheet and args.sheet.with_name(f"{args.sheet.stem}-parts"))
    for name, spec in sets.items():
        for photograph in photographs(spec, args.count):
            for contest in asked:
                bench.measure(f"{name}/{contest.kind}", contest, SETS.index(name), photograph)
                print(f"\r{name} {photograph.position + 1} {contest.kind}    ", end="", file=sys.stderr)
            told["data"] = told.get("data", {}) | {name: public(spec)}
            told["commands"] = list(dict.fromkeys([*told.get("commands", []), command_line()]))
            told["machine"] = describe_machine()
            for entry in told["contests"].values():
                entry["rows"] = rows(entry, list(told["methods"][entry["task"]]))
            write_json(told, args.out)
    print(file=sys.stderr)
    for name, entry in told["contests"].items():
        print("\n".join([name, *(f"  {line(row)}" for row in entry["rows"])]))
    for name, columns in bench.columns.items():
        path = args.sheet.with_stem(f"{args.sheet.stem}-{name.replace('/', '-')}")
        contact_sheet({label: torch.stack(parts) for label, parts in columns.items()}, SIDE).save(path)


if __name__ == "__main__":
    main()
