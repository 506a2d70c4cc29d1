"""The sections of `codi demo`: one per task, photographs, guidance and composition of adapters."""

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
from .gallery import (
    STEPS,
    Column,
    Inputs,
    Section,
    commands,
    format_steps,
    make_inputs,
    make_pictures,
    measure,
    photographs,
)

ABOUT = {  # task -> (heading of its input, description)
    "upscale": ("input", "A small picture is enlarged {scale} times. No prompt is used: the captions only describe "
                "the pictures."),
    "inpaint": ("hole", "The masked area (grey) is generated from the prompt; every other pixel is kept exactly. "
                "The masks cycle through boxes, strokes, objects and outpainting."),
    "depth": ("depth", "A depth map, bright where near, and a prompt become a picture of that geometry. The truth is "
              "one of many correct answers: the map does not determine light and texture."),
    "canny": ("edges", "An edge map and a prompt become a picture with these edges."),
    "edit": ("before", "A picture is changed as an instruction says; everything that the instruction does not "
             "mention should stay as it was."),
    "generate": ("", "A prompt alone becomes a picture: few steps of the distilled adapter, beside the plain backbone "
                 "with its usual many steps."),
}  # fmt: skip
MANY_STEPS = {"generate": 50, "finetuned": 50, "same": 20}
GUIDANCE = 3.0  # scale of the plain backbone, unless the generate adapter records another
PAIRS = (("depth", "inpaint"), ("canny", "inpaint"), ("canny", "upscale"))  # the first pair with both adapters is shown
SCALES = (1.0, 2.0, 4.0)
SECONDS = 150  # budget for sampling, photographs and training excluded
FEW = 3  # rows in the sections on composition and guidance


def describe_task(task: str) -> tuple[str, str]:
    """Return the input's heading and the description from ABOUT; of any other task, "input" and its docstring."""
    return ABOUT.get(task, ("input", str(TASKS[task].__doc__).split("\n\n")[0]))


class Show:
    """The available adapters on one backbone, and the sections of the page made with them. `adapters`: task -> facts
    on its adapter; `skipped`: name of a task, adapter or section that cannot be shown -> reason."""

    def __init__(
        self, pipe: CoDiPipeline, out: Path, seed: int, model: str, folder: Path | None, finetuned: Path | None
    ) -> None:
        self.pipe, self.out, self.seed = pipe, out, seed
        # The page's commands are run in its own folder, where relative paths would not resolve.
        self.model = str(Path(model).resolve()) if Path(model).exists() else model
        self.folder = folder.resolve() if folder else None
        # The backbone's native picture size, clamped to the sizes at which scenes are rendered.
        native = pipe.kind.sample_size(pipe.network, pipe.vae) * codec.downscale(pipe.vae)
        self.side = max(32, min(512, native))
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
            info = self._info(task)
            keys = ("full", "steps", "guidance", "guidance_scale", "images")
            size = sum(p.stat().st_size for p in source.glob("**/*.safetensors") if "checkpoints" not in p.parts)
            self.adapters[task] = {**{key: info.get(key) for key in keys}, "bytes": size}
            name = f"{task}-finetuned"
            finetuned_source = finetuned / name if finetuned else find_adapter(name, model)
            try:
                if (finetuned_source / "config.json").is_file():
                    pipe.load_adapter(finetuned_source, as_=name, task=task)
            except UserError as error:
                if finetuned:  # embedded adapters are expected to fit the embedded backbone only
                    self.skipped[name] = str(error)
        if not self.adapters:
            raise UserError(f"{folder or 'the embedded adapters'}: {next(iter(self.skipped.values()))}")

    def _info(self, name: str) -> dict[str, Any]:
        self.pipe.set_adapters(name)
        return self.pipe.adapter.config["info"] or {}  # type: ignore[union-attr]

    def fitting(self, least: int = 2, most: int = 6) -> int:
        """Return the number of scenes per task that this machine samples in about SECONDS."""
        columns = [self._many(task) for task in self.adapters]
        passes = sum(sum(STEPS) + column.steps * (1 if column.guidance in (None, 1) else 2) for column, _ in columns)
        self.pipe.set_adapters([])
        for steps in (1, 4):  # the first call is slower
            start = time.perf_counter()
            self.pipe(steps=steps, seed=self.seed)
        return max(least, min(most, round(SECONDS / (passes * (time.perf_counter() - start) / 4))))

    def task(self, name: str, samples: list[Sample]) -> Section:
        """Make the section of one task: 1, 2 and 4 steps, many steps, the truth."""
        many = self._many(name)
        return self._section(name, name, name.capitalize(), describe_task(name), samples, many)

    def photographs(self, titles: Mapping[str, str]) -> Section | None:
        """Make the section that upscales photographs in few steps; None without photographs."""
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
        many: tuple[Column, str] | None = None,
    ) -> Section:
        """Make a section of the adapter `kind`.

        `about`: the input's heading and a description; `many`: the many-step column and a note on it.
        """
        self.pipe.set_adapters(kind)
        task = self.pipe.tasks[kind]
        inputs = make_inputs(task, kind, samples, self.seed)
        inputs.given[f"{kind}-finetuned"] = inputs.given[kind]
        generated = [Column(f"steps-{n}", format_steps(n), (kind,), n) for n in STEPS] + ([many[0]] if many else [])
        before = {key: heading for key, heading in (("given", about[0]), ("bicubic", "bicubic")) if key in inputs.shown}
        after = {"truth": "truth"} if "truth" in inputs.shown else {}
        columns = before | {column.key: column.heading for column in generated} | after
        sides = [next(reversed(before), "many"), "steps-4"]
        section = Section(name, title, about[1].format(scale=task.scale), sides, columns, many[1] if many else "")
        results = self._make(section, inputs, generated)
        measure(section, task, inputs, results)
        section.commands = commands(section, task, inputs, self.seed, self._options(kind))
        return section

    def _options(self, kind: str) -> list[str]:
        """Return the options that the page's commands need beside the defaults."""
        adapter = str(self.folder / kind) if self.folder else None
        options = ["--model", self.model] if self.model != default_model(adapter or kind) else []
        return [*options, "--adapter", adapter] if adapter else options

    def _make(self, section: Section, inputs: Inputs, columns: list[Column]) -> dict[str, Tensor]:
        with progress("pictures") as bar:
            line = bar.add_task(section.title, total=len(columns) * len(inputs.names))
            return make_pictures(self.pipe, section, inputs, columns, self.out, self.seed, lambda: bar.advance(line))

    def _many(self, kind: str) -> tuple[Column, str]:
        """Return the many-step column of a task, and a note that says which model it is."""
        info = self._info(kind)
        if kind == "generate":
            steps, guidance = MANY_STEPS["generate"], max(info.get("guidance_scale") or 1.0, 1.0)
            guidance = guidance if guidance > 1 else GUIDANCE
            note = (f"The last column is the backbone itself, without the adapter: {steps} steps with classifier-free "
                    f"guidance {guidance:g}, two passes each, from the same noise.")  # fmt: skip
            return Column("many", f"backbone, {steps} steps", (), steps, guidance), note
        if f"{kind}-finetuned" in self.pipe.adapters:
            # The few-step adapter has guidance distilled in, so the reference is guided too.
            steps, guidance = MANY_STEPS["finetuned"], self.pipe.guidance().scales["text"]
            guided = f" with classifier-free guidance {guidance:g}, two passes each" if guidance != 1 else ""
            note = (f"The many-step column is the fine-tuned diffusion model in {steps} steps{guided}: the same "
                    "backbone and condition encoder, trained by the plain diffusion loss.")  # fmt: skip
            return Column("many", f"fine-tuned, {steps} steps", (f"{kind}-finetuned",), steps, guidance), note
        steps = MANY_STEPS["same"]
        note = (f"The many-step column is the same adapter in {steps} steps, not another model: it shows what more "
                "steps would add. No fine-tuned diffusion model of this task is here.")  # fmt: skip
        return Column("many", f"same adapter, {steps} steps", (kind,), steps), note

    def swap_ms(self) -> float | None:
        """Return the median milliseconds to switch adapters on the same backbone; None with fewer than two."""
        if len(self.adapters) < 2:
            return None
        milliseconds = []
        for name in list(self.adapters) * 3:
            start = time.perf_counter()
            self.pipe.set_adapters(name)
            _ = self.pipe.student
            milliseconds.append(1000 * (time.perf_counter() - start))
        return round(median(milliseconds), 3)

    def guidance(self, samples: list[Sample]) -> Section | None:
        """Make the section on distilled guidance, one pass per step at several scales; None where no adapter has it."""
        spans = {name: (info["guidance"] or {}).get("text", (1, 1)) for name, info in self.adapters.items()}
        scales = {name: [g for g in SCALES if low <= g <= high] for name, (low, high) in spans.items()}
        # In reverse order, so that generate, where guidance shows most, comes first.
        name = next((n for n in reversed(scales) if len(scales[n]) > 1), None)
        if name is None:
            self.skipped["guidance"] = "no adapter has guidance distilled in"
            return None
        self.pipe.set_adapters(name)
        task = self.pipe.tasks[name]
        inputs = make_inputs(task, name, samples, self.seed)
        generated = [Column(f"guidance-{g:g}", f"guidance {g:g}", (name,), 4, g) for g in scales[name]]
        columns = ({"given": describe_task(name)[0]} if "given" in inputs.shown else {}) | {
            c.key: c.heading for c in generated
        }
        section = Section(
            "guidance", "Guidance in one pass",
            f"How closely the {name} adapter follows the prompt, in 4 steps. The guidance scale is an input of the "
            "network, so that every scale takes one pass a step; 1 is no guidance.",
            [generated[0].key, generated[-1].key], columns,
        )  # fmt: skip
        self._make(section, inputs, generated)
        options = ["--guidance", f"{scales[name][-1]:g}", *self._options(name)]
        section.commands = commands(section, task, inputs, self.seed, options)
        return section

    def composition(self, samples: list[Sample]) -> Section | None:
        """Make the section on two adapters at once; None where no two can be combined."""
        pair = next((p for p in PAIRS if set(p) <= set(self.adapters)), None)
        try:
            if pair is None:
                raise UserError("needs two adapters: " + ", or ".join(" and ".join(p) for p in PAIRS))
            self.pipe.set_adapters(pair)
        except UserError as error:
            self.skipped["composition"] = str(error)
            return None
        parts = {name: make_inputs(task, name, samples, self.seed) for name, task in self.pipe.tasks.items()}
        first, second = parts.values()
        shown = {f"given-{name}": part.shown["given"] for name, part in parts.items()} | {
            key: second.shown[key] for key in ("mask", "truth") if key in second.shown
        }
        prompts = first.prompts if any(first.prompts) else second.prompts
        inputs = Inputs(first.names, first.titles, prompts, first.given | second.given, shown, first.batch)
        generated = [
            *(Column(f"only-{n}", f"{n} alone", (n,), 4) for n in pair),
            Column("both", "both", tuple(pair), 4),
        ]
        columns = (
            {f"given-{n}": describe_task(n)[0] for n in pair}
            | {c.key: c.heading for c in generated}
            | {"truth": "truth"}
        )
        about = "Two adapters on one backbone, each with its own condition, in 4 steps."
        title = f"{pair[0].capitalize()} and {pair[1]} at once"
        section = Section("composition", title, about, [generated[1].key, "both"], columns)
        self._make(section, inputs, generated)
        section.commands = [self._script(pair, inputs)]
        return section

    def _script(self, pair: Sequence[str], inputs: Inputs) -> str:
        """Return a Python script that reproduces the first composed picture."""
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
        files = {name: f"composition/{column.get(name, f'given-{name}')}/{inputs.names[0]}.png" for name in pair}
        suffix = {"canny": '.convert("1")'}  # two levels mark an edge map, from which no edges are extracted
        images = [f'{name!r}: Image.open("{file}"){suffix.get(name, "")}' for name, file in files.items()]
        lines += [f"    image={{{', '.join(images)}}},"]
        if "mask" in inputs.shown:
            lines += [f'    mask=Image.open("composition/mask/{inputs.names[0]}.png"),']
        lines += [f"    prompt={inputs.prompts[0]!r}, steps=4, seed={self.seed},", ').images[0].save("again.png")']
        return "\n".join(lines)
