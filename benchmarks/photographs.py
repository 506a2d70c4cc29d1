"""Upscalers and inpainters side by side on real photographs, whole pictures, on the CPU.

    python benchmarks/photographs.py --set14 DIR --ours NAME=ADAPTER[@MODEL] --baselines bicubic --out results.json
    ... --bsd100 DIR --val FILE.tar --baselines bicubic realesrgan esrgan --realesrgan FOLDER --esrgan FOLDER
    ... --inpaint NAME=ADAPTER[@MODEL] --steps 1 4 --degradations bicubic real --count 20 --sheet sheet.png

Upscaling x4: a photograph, cropped to multiples of 16 px, is downscaled once for each degradation, `bicubic` or `real`
(with its own seed), and every method gets the whole result: ours through the public pipeline, which tiles large images.
Inpainting: the center of 256 px with a hole, `boxes` or `strokes`, drawn as in training; ours gets the caption if the
set has captions, OpenCV's Telea and Navier-Stokes take none. baselines.py says where to get the baselines' weights,
rows.py what the figures in --out mean.

Figures in --out are not measured again unless the method's weights or its input changed; other methods' rows stay.
Changes of code are not detected: use another --out then. --sheet sheet.png writes sheet-SET-KIND.png; its parts stay in
the folder sheet-parts.
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
from rows import JSONDict, drop_outdated, line, load_results, rows
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
SIDE, SHOWN = 256, 6  # pixels of inpainted images and of the parts on sheets; images on a sheet
PATCH = 224  # pixels: the feature network's own size


@dataclass(frozen=True)
class Entrant:
    """A method at one step count. `make(inputs (1, C, h, w), prompt, seed)` returns an image (1, 3, H, W) in [0, 1];
    `told` holds everything else that its images depend on, as JSON values."""

    label: str
    make: Callable[[Tensor, str, int], Tensor]
    told: JSONDict


@dataclass(frozen=True)
class Contest:
    """One task on one kind of input. `given(batch, generator)` makes the inputs of all entrants, (1, C, h, w), from the
    true image, which is cropped to at most `most` px a side (None: not cropped)."""

    kind: str
    task: Task
    given: Callable[[Batch, torch.Generator], Tensor]
    entrants: list[Entrant]
    most: int | None = None


@dataclass(frozen=True)
class Photograph:
    """One photograph: position in its set, name, pixels (3, H, W) in [0, 1] and caption ("" for none)."""

    position: int
    name: str
    rgb: Tensor
    text: str = ""


# --- inputs and figure -----------------------------------------------------------------------------------------------


def photographs(spec: str, count: int | None) -> Iterator[Photograph]:
    """Yield the first `count` photographs of a folder or tar, uncropped. Raises UserError for unreadable ones."""
    source = open_source(spec)
    if not isinstance(source, PictureSource):
        raise UserError(f"{spec}: holds no files: give a folder of images or a .tar")
    for position in range(min(len(source), count or len(source))):
        name = Path(source.name(position)).name
        try:
            row = source.row(position)
            picture, _ = source.decode(row)
        except Exception as error:  # as PictureSource._read: decoders raise nearly every type there is
            raise UserError(f"{name}: {why_unreadable(error)}: copy it again, or remove it from the set") from error
        rgb = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        yield Photograph(position, name, rgb, row.text)


def center_crop(image: Tensor, most: int | None = None) -> Tensor:
    """Return the center of (..., H, W) with sides that are multiples of MULTIPLE and at most `most`."""
    height, width = (min(side // MULTIPLE * MULTIPLE, most or side) for side in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def with_hole(batch: Batch, generator: torch.Generator, kind: str) -> Tensor:
    """Return the image and a mask of one kind, (1, 4, H, W), drawn as the task draws them, but never covering all or
    none of the image."""
    height, width = batch.image.shape[-2:]
    mask = DRAW[kind](height, width, np.random.default_rng(seeds(batch, generator)[0]))
    return torch.cat([batch.image, torch.from_numpy(mask)[None, None]], 1)


def patch_distance(output: Tensor, truth: Tensor) -> Tensor:
    """Return the mean ENLite0 distance (1,) of evenly spaced patches of PATCH px that cover (1, 3, H, W)."""
    side = min(PATCH, *truth.shape[-2:])
    tops, lefts = (np.linspace(0, x - side, -(-x // side)).round().astype(int) for x in truth.shape[-2:])
    corners = [(y, x) for y in tops for x in lefts]
    cut = [torch.cat([image[..., y : y + side, x : x + side] for y, x in corners]) for image in (output, truth)]
    return enlite0_distance(*cut).mean(0, keepdim=True)


def figures(output: Tensor, batch: Batch, inputs: Tensor, task: Task) -> dict[str, float]:
    """Return the figures of one image; NaNs of the task's obedience are left out."""
    features, truth = default_features(), batch.image
    values = {"psnr": psnr(output, truth), "ssim": ssim(output, truth)}
    values["distance"] = maps_distance(features(output), features(truth))
    values["patch_distance"] = patch_distance(output, truth)
    values |= task.obedience(output, inputs, batch)
    return {name: float(value) for name, value in values.items() if not value.isnan()}


# --- the entrants ----------------------------------------------------------------------------------------------------


def ours(task: str, option: str, steps: Sequence[int]) -> list[Entrant]:
    """Return NAME=ADAPTER[@MODEL] at each step count. Raises UserError for a missing adapter or another scale."""
    name, equals, source = option.partition("=")
    adapter, _, model = source.partition("@")
    if not (equals and name and adapter):
        raise UserError(f"{option}: not NAME=ADAPTER[@MODEL]: give an embedded adapter's name or a folder")
    pipe = CoDiPipeline.from_pretrained(model or "mini", task=task, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    if task == "upscale" and pipe.task.scale != SCALE:  # type: ignore[union-attr]
        raise UserError(f"{option}: this adapter does not enlarge {SCALE} times: use one that does")
    parts = {"codec": pipe.vae, "decoder": pipe.tiny_vae, "unet": pipe.student.network, "adapter_weights": pipe.adapter}
    dependencies = {"adapter": public(adapter), "model": public(model or "mini")}
    dependencies |= {part: digest(module) for part, module in parts.items() if module is not None}
    method = pipeline_method(pipe, steps, name)

    def make(inputs: Tensor, prompt: str, seed: int, steps: int) -> Tensor:
        return method.run(inputs, [prompt], steps, [seed])

    return [Entrant(f"{name} · {n}", partial(make, steps=n), {**dependencies, "steps": n}) for n in steps]


def plain(label: str, function: Callable[[Tensor], Tensor], dependencies: JSONDict | None = None) -> Entrant:
    """Return the entrant of a function that takes neither prompt nor seed."""
    return Entrant(label, lambda inputs, prompt, seed: function(inputs), dependencies or {})


def upscalers(args: argparse.Namespace) -> list[Entrant]:
    """Return the selected baselines, then ours. Raises UserError if one is missing."""
    entrants = []
    for name in args.baselines:
        if name == "bicubic":
            entrants.append(plain(name, Upscale(SCALE).condition))
        else:
            net = ESRGAN(args.esrgan) if name == "esrgan" else RealESRGAN(args.realesrgan, args.threads)
            entrants.append(plain(name, net, net.settings))
    return entrants + [entrant for option in args.ours for entrant in ours("upscale", option, args.steps)]


def inpainters(args: argparse.Namespace) -> list[Entrant]:
    """Return OpenCV's two methods, then ours."""
    entrants = [plain(name, partial(fill, method=name), {"radius": RADIUS}) for name in OPENCV]
    return entrants + [entrant for option in args.inpaint for entrant in ours("inpaint", option, args.steps)]


def contests(args: argparse.Namespace) -> list[Contest]:
    """Return the contests of the options: upscaling unless only --inpaint is given."""
    selected = []
    if args.ours or args.baselines:
        entrants = upscalers(args)
        for kind in args.degradations:
            task = Upscale(SCALE, kind)
            selected.append(Contest(kind, task, task.given, entrants))
    if args.inpaint:
        entrants = inpainters(args)
        selected += [Contest(kind, Inpaint((kind,)), partial(with_hole, kind=kind), entrants, SIDE) for kind in HOLES]
    for contest in selected:
        labels = [entrant.label for entrant in contest.entrants]
        if len(set(labels)) < len(labels):
            raise UserError(f"{', '.join(labels)}: two of one name: rename one of them")
    return selected


# --- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """Measures the figures that `results`, the content of --out, lacks; saves parts for sheets in the folder
    `parts`."""

    def __init__(self, results: JSONDict, seed: int, parts: Path | None = None) -> None:
        self.results, self.seed, self.parts = results, seed, parts
        self.warm: set[int] = set()
        self.columns: dict[str, dict[str, list[Tensor]]] = {}  # by contest and label, for its sheet

    @torch.inference_mode()
    def measure(self, name: str, contest: Contest, number: int, photograph: Photograph) -> None:
        """Measure one photograph of set `number` by all entrants into results["contests"][name]."""
        truth = center_crop(photograph.rgb, contest.most)[None].contiguous()
        batch = Batch(truth, [photograph.text], index=[photograph.position])
        # A separate stream: otherwise the degradation's noise would equal the sampler's.
        key = np.random.SeedSequence([self.seed, number, photograph.position]).generate_state(1, np.uint64)[0]
        inputs = contest.given(batch, torch.Generator().manual_seed(int(key >> np.uint64(1))))
        levels = [(image * 255).round().byte().numpy().tobytes() for image in (inputs, truth)]
        digest = hashlib.sha256(b"".join(levels)).hexdigest()[:12]
        entry = self.results["contests"].setdefault(name, {"task": contest.task.name, "pictures": {}})
        record = entry["pictures"].get(photograph.name)
        if record is None or record["digest"] != digest:
            record = {"size": [truth.shape[-1], truth.shape[-2]], "digest": digest, "figures": {}}
            entry["pictures"][photograph.name] = record
        shown = {"given": shown_part(inputs if inputs.shape[1] == 3 else contest.task.condition(inputs)[:, :3], truth)}
        for entrant in contest.entrants:
            part = self._part(name, entrant, record) if photograph.position < SHOWN else None
            if entrant.label not in record["figures"] or (part and not part.is_file()):
                output, seconds = self._timed(entrant, contest, batch, inputs)
                record["figures"][entrant.label] = figures(output, batch, inputs, contest.task) | seconds
                if part:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    write_image(part, shown_part(output, truth), overwrite=True)
            if part:
                shown[entrant.label] = read_image(part).rgb
        if self.parts and photograph.position < SHOWN:
            for label, picture in {**shown, "truth": shown_part(truth, truth)}.items():
                self.columns.setdefault(name, {}).setdefault(label, []).append(picture)

    def _timed(
        self, entrant: Entrant, contest: Contest, batch: Batch, inputs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        prompt, seed = contest.task.prompts(batch)[0], sample_seeds(self.seed, batch.index)[0]
        if id(entrant) not in self.warm:  # warm-up: the first call allocates memory
            entrant.make(inputs[..., :32, :32].contiguous(), prompt, seed)
            self.warm.add(id(entrant))
        clock, cpu = time.perf_counter(), time.process_time()
        output = entrant.make(inputs, prompt, seed)
        seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        if output.shape != batch.image.shape:
            raise ValueError(
                f"{entrant.label}: output has shape {tuple(output.shape)}, the true image {tuple(batch.image.shape)}"
            )
        if not output.isfinite().all():
            raise UserError(f"{entrant.label}: output has non-finite values: check its weights")
        return output.clone().float().clamp(0, 1), seconds

    def _part(self, name: str, entrant: Entrant, record: JSONDict) -> Path | None:
        """Return the file of an image's part for sheets; its name depends on method and input."""
        if not self.parts:
            return None
        key = zlib.crc32(json.dumps([entrant.label, entrant.told, record["digest"]]).encode())
        return self.parts / name.replace("/", "-") / f"{key:08x}.png"


def shown_part(image: Tensor, truth: Tensor) -> Tensor:
    """Return the center of (1, 3, h, w) that shows SIDE px of `truth`, padded with black; smaller for smaller
    images."""
    ratio = truth.shape[-1] // image.shape[-1]
    side = SIDE // ratio
    height, width = (min(side, extent) for extent in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    above, before = (side - height) // 2, (side - width) // 2
    part = image[0, :, top : top + height, left : left + width]
    return F.pad(part, (before, side - width - before, above, side - height - above))


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure photograph by photograph and write the results after each."""
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
    parser.add_argument("--count", type=int, help="use the first COUNT photographs of each set; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="a .png; writes one for each contest, named STEM-SET-KIND.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Run the contests of the options. Raises UserError for mistakes that a user can fix."""
    results = load_results(args.out, {"seed": args.seed, "threads": args.threads})
    selected, sets = contests(args), {name: getattr(args, name) for name in SETS if getattr(args, name)}
    if not selected or not sets:
        raise UserError("nothing to measure: give a set, and some of --ours, --baselines, --inpaint")
    for contest in selected:
        drop_outdated(results, contest.task.name, {entrant.label: entrant.told for entrant in contest.entrants})
    bench = Bench(results, args.seed, args.sheet and args.sheet.with_name(f"{args.sheet.stem}-parts"))
    for name, spec in sets.items():
        for photograph in photographs(spec, args.count):
            for contest in selected:
                bench.measure(f"{name}/{contest.kind}", contest, SETS.index(name), photograph)
                print(f"\r{name} {photograph.position + 1} {contest.kind}    ", end="", file=sys.stderr)
            results["data"] = results.get("data", {}) | {name: public(spec)}
            results["commands"] = list(dict.fromkeys([*results.get("commands", []), command_line()]))
            results["machine"] = describe_machine()
            for entry in results["contests"].values():
                entry["rows"] = rows(entry, list(results["methods"][entry["task"]]))
            write_json(results, args.out)
    print(file=sys.stderr)
    for name, entry in results["contests"].items():
        print("\n".join([name, *(f"  {line(row)}" for row in entry["rows"])]))
    for name, columns in bench.columns.items():
        path = args.sheet.with_stem(f"{args.sheet.stem}-{name.replace('/', '-')}")
        contact_sheet({label: torch.stack(parts) for label, parts in columns.items()}, SIDE).save(path)


if __name__ == "__main__":
    main()
