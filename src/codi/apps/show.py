"""What `codi demo` shows: a section for every task, and some on what adapters do beyond their task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ..data.samples import Sample
from ..errors import UserError
from ..models import codec
from ..models.adapter_files import default_model, find_adapter
from ..sampling.pipeline import CoDiPipeline
from ..tasks import TASKS
from .common import progress
from .gallery import STEPS, Section, Subject, Way, commands, counted, make, measure, photographs, subject

ABOUT = {  # task -> what its result is made of, as a heading; what it does
    "upscale": ("input", "A small picture comes back {scale} times larger. No prompt: the captions only say what is "
                "to be seen."),
    "inpaint": ("hole", "What lies under the mask (grey) is made anew as the prompt says; every other pixel comes back "
                "exactly. Boxes, strokes, objects and outpainting take turns."),
    "depth": ("depth", "A depth map, bright where near, and a prompt become a picture of that geometry. The truth is "
              "one answer of many: the map says nothing of light and texture."),
    "canny": ("edges", "An edge map and a prompt become a picture with these edges."),
    "edit": ("before", "A picture and an instruction become the picture afterwards; what the instruction does not "
             "speak of is to stay as it was."),
    "generate": ("", "A prompt alone becomes a picture: the accelerator, beside the backbone in its usual many "
                 "steps."),
}  # fmt: skip
MANY_STEPS = {"generate": 50, "finetuned": 50, "same": 20}
GUIDANCE = 3.0  # of the plain backbone, unless the accelerator names another
PAIRS = (("depth", "inpaint"), ("canny", "inpaint"), ("canny", "upscale"))  # the first whose adapters are here is shown
SCALES = (1.0, 2.0, 4.0)
SECONDS = 150  # of sampling that a tour may take, photographs and training aside
FEW = 3  # rows of the sections on composition and guidance


def introduced(task: str) -> tuple[str, str]:
    """Of ABOUT; for a task that is not in it yet, what its own docstring says."""
    return ABOUT.get(task, ("given", str(TASKS[task].__doc__).split("\n\n")[0]))


class Show:
    """The adapters that are here, on one backbone, and the sections made with them. `adapters`: task -> what is known
    of its adapter; `skipped`: what cannot be shown -> why."""

    def __init__(
        self, pipe: CoDiPipeline, out: Path, seed: int, model: str, folder: Path | None, finetuned: Path | None
    ) -> None:
        self.pipe, self.out, self.seed = pipe, out, seed
        # The page tells what to type in its own folder: there, relative paths would not lead anywhere.
        self.model = str(Path(model).resolve()) if Path(model).exists() else model
        self.folder = folder.resolve() if folder else None
        # The backbone's own picture size, as far as scenes are rendered at it.
        own = pipe.kind.sample_size(pipe.network, pipe.vae) * codec.downscale(pipe.vae)
        self.side = max(32, min(512, own))
        self.adapters: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        for task in TASKS:
            source = folder / task if folder else find_adapter(task, model)
            try:
                if not (source / "config.json").is_file():
                    raise UserError(f"no adapter of this task is here: `codi distill {task} --out "
                                    f"ADAPTERS/{task}` trains one for `codi demo --adapters ADAPTERS`")  # fmt: skip
                pipe.load_adapter(source, as_=task, task=task)
            except UserError as error:
                self.skipped[task] = str(error)
                continue
            told = self._info(task)
            keys = ("full", "steps", "guidance", "guidance_scale", "images")
            size = sum(p.stat().st_size for p in source.glob("**/*.safetensors") if "checkpoints" not in p.parts)
            self.adapters[task] = {**{key: told.get(key) for key in keys}, "bytes": size}
            name = f"{task}-finetuned"
            many = finetuned / name if finetuned else find_adapter(name, model)
            try:
                if (many / "config.json").is_file():
                    pipe.load_adapter(many, as_=name, task=task)
            except UserError as error:
                if finetuned:  # the embedded ones fit the embedded backbone alone
                    self.skipped[name] = str(error)
        if not self.adapters:
            raise UserError(f"{folder or 'the embedded adapters'}: {next(iter(self.skipped.values()))}")

    def _info(self, name: str) -> dict[str, Any]:
        self.pipe.set_adapters(name)
        return self.pipe.adapter.config["info"] or {}  # type: ignore[union-attr]

    def fitting(self, least: int = 2, most: int = 6) -> int:
        """How many scenes a task can be shown on within about SECONDS on this machine."""
        many = [self._many(kind) for kind in self.adapters]
        passes = sum(sum(STEPS) + way.steps * (1 if way.guidance in (None, 1) else 2) for way, _ in many)
        self.pipe.set_adapters([])
        for steps in (1, 4):  # the first call is slower
            began = time.perf_counter()
            self.pipe(steps=steps, seed=self.seed)
        return max(least, min(most, round(SECONDS / (passes * (time.perf_counter() - began) / 4))))

    def task(self, name: str, samples: list[Sample]) -> Section:
        """The section of one task: 1, 2 and 4 steps, many steps, the truth."""
        many = self._many(name)
        return self._section(name, name, name.capitalize(), introduced(name), samples, many)

    def photographs(self, titles: Mapping[str, str]) -> Section | None:
        """Upscaling of what the model was not trained on, in few steps; None without any photograph."""
        self.pipe.set_adapters("upscale")
        samples = photographs(titles, 3 * self.side, self.pipe.task.scale)  # type: ignore[union-attr]
        about = "The same upscaler on pictures of another kind than those it was trained on."
        return self._section("photographs", "upscale", "Photographs", ("input", about), samples) if samples else None

    def _section(
        self,
        name: str,
        kind: str,
        title: str,
        about: tuple[str, str],
        samples: list[Sample],
        many: tuple[Way, str] | None = None,
    ) -> Section:
        """`about`: the heading of what is given and a sentence; `many`: the last column and a note on it."""
        self.pipe.set_adapters(kind)
        task = self.pipe.tasks[kind]
        what = subject(task, kind, samples, self.seed)
        what.given[f"{kind}-finetuned"] = what.given[kind]
        ways = [Way(f"steps-{n}", counted(n), (kind,), n) for n in STEPS] + ([many[0]] if many else [])
        before = {key: heading for key, heading in (("given", about[0]), ("bicubic", "bicubic")) if key in what.shown}
        after = {"truth": "truth"} if "truth" in what.shown else {}
        columns = before | {way.key: way.heading for way in ways} | after
        sides = [next(reversed(before), "many"), "steps-4"]
        section = Section(name, title, about[1].format(scale=task.scale), sides, columns, many[1] if many else "")
        made = self._make(section, what, ways)
        measure(section, task, what, made)
        section.commands = commands(section, task, what, self.seed, self._options(kind))
        return section

    def _options(self, kind: str) -> list[str]:
        """What the commands name, beside the defaults."""
        adapter = str(self.folder / kind) if self.folder else None
        options = ["--model", self.model] if self.model != default_model(adapter or kind) else []
        return [*options, "--adapter", adapter] if adapter else options

    def _make(self, section: Section, what: Subject, ways: list[Way]) -> dict[str, Tensor]:
        with progress("pictures") as bar:
            line = bar.add_task(section.title, total=len(ways) * len(what.names))
            return make(self.pipe, section, what, ways, self.out, self.seed, lambda: bar.advance(line))

    def _many(self, kind: str) -> tuple[Way, str]:
        """The many-step column of a task, and what it truly is."""
        told = self._info(kind)
        if kind == "generate":
            steps, guidance = MANY_STEPS["generate"], max(told.get("guidance_scale") or 1.0, 1.0)
            guidance = guidance if guidance > 1 else GUIDANCE
            note = (f"The last column is the backbone itself, without the adapter: {steps} steps with classifier-free "
                    f"guidance {guidance:g}, two passes each, from the same noise.")  # fmt: skip
            return Way("many", f"backbone, {steps} steps", (), steps, guidance), note
        if f"{kind}-finetuned" in self.pipe.adapters:
            # Few steps have their guidance distilled in: what they are compared with shall not go without.
            steps, guidance = MANY_STEPS["finetuned"], self.pipe.guidance().scales["text"]
            how = f" with classifier-free guidance {guidance:g}, two passes each" if guidance != 1 else ""
            note = (f"The many-step column is the fine-tuned diffusion model in {steps} steps{how}: the same backbone "
                    "and condition encoder, trained by the plain diffusion loss.")  # fmt: skip
            return Way("many", f"fine-tuned, {steps} steps", (f"{kind}-finetuned",), steps, guidance), note
        steps = MANY_STEPS["same"]
        note = (f"The many-step column is the same adapter in {steps} steps, not another model: it shows what more "
                "steps would add. No fine-tuned diffusion model of this task is here.")  # fmt: skip
        return Way("many", f"same adapter, {steps} steps", (kind,), steps), note

    def swap_ms(self) -> float | None:
        """Median milliseconds to set another adapter on the same backbone; None with fewer than two."""
        if len(self.adapters) < 2:
            return None
        spent = []
        for name in list(self.adapters) * 3:
            began = time.perf_counter()
            self.pipe.set_adapters(name)
            _ = self.pipe.student
            spent.append(1000 * (time.perf_counter() - began))
        return round(median(spent), 3)

    def guidance(self, samples: list[Sample]) -> Section | None:
        """Distilled guidance at several scales, one pass a step each; None where no adapter has it."""
        spans = {name: (told["guidance"] or {}).get("text", (1, 1)) for name, told in self.adapters.items()}
        scales = {name: [g for g in SCALES if low <= g <= high] for name, (low, high) in spans.items()}
        name = next((n for n in reversed(scales) if len(scales[n]) > 1), None)  # generate first: there it shows most
        if name is None:
            self.skipped["guidance"] = "no adapter here has guidance distilled in"
            return None
        self.pipe.set_adapters(name)
        task = self.pipe.tasks[name]
        what = subject(task, name, samples, self.seed)
        ways = [Way(f"guidance-{g:g}", f"guidance {g:g}", (name,), 4, g) for g in scales[name]]
        columns = ({"given": introduced(name)[0]} if "given" in what.shown else {}) | {w.key: w.heading for w in ways}
        section = Section(
            "guidance", "Guidance in one pass",
            f"How closely the prompt is followed, by the {name} adapter in 4 steps. The scale is an input of the "
            "network, so that a larger one costs nothing; 1 is none.",
            [ways[0].key, ways[-1].key], columns,
        )  # fmt: skip
        self._make(section, what, ways)
        options = ["--guidance", f"{scales[name][-1]:g}", *self._options(name)]
        section.commands = commands(section, task, what, self.seed, options)
        return section

    def composition(self, samples: list[Sample]) -> Section | None:
        """Two adapters at once; None where there are no two that can be combined."""
        pair = next((p for p in PAIRS if set(p) <= set(self.adapters)), None)
        try:
            if pair is None:
                raise UserError("needs two adapters: " + ", or ".join(" and ".join(p) for p in PAIRS))
            self.pipe.set_adapters(pair)
        except UserError as error:
            self.skipped["composition"] = str(error)
            return None
        parts = {name: subject(task, name, samples, self.seed) for name, task in self.pipe.tasks.items()}
        one, two = parts.values()
        shown = {f"given-{name}": part.shown["given"] for name, part in parts.items()} | {
            key: two.shown[key] for key in ("mask", "truth") if key in two.shown
        }
        prompts = one.prompts if any(one.prompts) else two.prompts
        what = Subject(one.names, one.titles, prompts, one.given | two.given, shown, one.batch)
        ways = [*(Way(f"only-{n}", f"{n} alone", (n,), 4) for n in pair), Way("both", "both", tuple(pair), 4)]
        columns = {f"given-{n}": introduced(n)[0] for n in pair} | {w.key: w.heading for w in ways} | {"truth": "truth"}
        about = "Two adapters on one backbone, each with a condition of its own, in 4 steps."
        title = f"{pair[0].capitalize()} and {pair[1]} at once"
        section = Section("composition", title, about, [ways[1].key, "both"], columns)
        self._make(section, what, ways)
        section.commands = [self._script(pair, what)]
        return section

    def _script(self, pair: Sequence[str], what: Subject) -> str:
        """Python that makes the first composed picture again."""
        sources = {name: str(self.folder / name) if self.folder else name for name in pair}
        lines = [
            "import codi",
            "from PIL import Image",
            "",
            f"pipe = codi.CoDiPipeline.from_pretrained({self.model!r})",
        ]
        lines += [f"pipe.load_adapter({source!r}, as_={name!r})" for name, source in sources.items()]
        lines += [f"pipe.set_adapters({list(pair)!r}, [1.0, 1.0])", "pipe("]
        column = {"inpaint": "truth"}
        files = {name: f"composition/{column.get(name, f'given-{name}')}/{what.names[0]}.png" for name in pair}
        kind = {"canny": '.convert("1")'}  # of two levels: an edge map already
        images = [f'{name!r}: Image.open("{file}"){kind.get(name, "")}' for name, file in files.items()]
        lines += [f"    image={{{', '.join(images)}}},"]
        if "mask" in what.shown:
            lines += [f'    mask=Image.open("composition/mask/{what.names[0]}.png"),']
        lines += [f"    prompt={what.prompts[0]!r}, steps=4, seed={self.seed},", ').images[0].save("again.png")']
        return "\n".join(lines)
