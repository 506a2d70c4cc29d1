"""`codi demo`: every task shown, on tiny models; a page that is whole, needs no network and says what is missing."""

from __future__ import annotations

import html
import json
import shlex
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codi.apps import demo, show
from codi.apps.lesson import train_upscaler
from codi.errors import UserError
from codi.models.adapter import FORMS
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS, get_task
from codi.training.saving import save_adapter
from shell import Shell
from tiny import tiny_backbone, tiny_checkpoint, tiny_lora

TRAINING = {"images": 16, "batch_size": 4, "data": "scenes:train:8", "log_every": 4, "preview_every": 8}
MANY = {"generate": 6, "finetuned": 6, "same": 5}  # steps: enough to differ from 4
VOID = {"img", "input", "meta", "br", "link"}


def make_adapter(folder: Path, name: str) -> Path:
    """An untrained adapter with some influence, with guidance distilled in where users give prompts."""
    parts, task = tiny_backbone(), get_task(name)
    guidance = {"text": [1.0, 5.0]} if task.prompted else {}
    form = FORMS["lora" if name == "generate" else "fused"]
    adapter = form.from_backbone(parts.unet, parts.vae, task.condition_channels, len(guidance))
    for mu in getattr(adapter, "mu", []):
        mu.data.fill_(0.1)
    if adapter.guidance is not None:
        adapter.guidance.projection.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    info = {"task": name, "task_options": task.config(), "steps": [1, 2, 4], "family": parts.family, "full": False}
    info |= {"guidance": guidance, "guidance_scale": 2.0 if guidance else 1.0}
    adapter.register_to_config(info=info)
    network = tiny_lora(parts.unet, name) if name == "generate" else parts.unet
    save_adapter(folder, adapter, network, full=False, half=False)
    return folder


@dataclass
class Toured:
    """A tour that was made: its folder, what it returned, its page."""

    out: Path
    model: Path
    adapters: Path
    told: dict
    page: str

    def section(self, name: str) -> dict:
        return next(s for s in self.told["sections"] if s["name"] == name)

    def pixels(self, file: str) -> np.ndarray:
        return np.asarray(Image.open(self.out / file).convert("RGB"), int)


@pytest.fixture(scope="module")
def toured(tmp_path_factory) -> Toured:
    folder = tmp_path_factory.mktemp("tour")
    model, adapters, out = tiny_checkpoint(folder / "model"), folder / "adapters", folder / "demo"
    for name in TASKS:
        make_adapter(adapters / name, name)
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "MANY_STEPS", MANY)
        told = demo.make_gallery(
            pipe, out, model=str(model), adapters=adapters, count=2, device="cpu", photographs={"coffee": "coffee"},
            changes=TRAINING, say=lambda line: None,
        )  # fmt: skip
    return Toured(out, model, adapters, told, (out / "index.html").read_text())


class Reader(HTMLParser):
    """Checks that what opens is closed, in order; collects tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_every_task_is_shown_in_few_steps_beside_many_and_the_truth(toured):
    assert toured.told == json.loads((toured.out / "timings.json").read_text())
    assert toured.told["skipped"] == {}
    names = [s["name"] for s in toured.told["sections"]]
    assert names == ["upscale", "photographs", *list(TASKS)[1:], "guidance", "composition"]
    for task in TASKS:
        section = toured.section(task)
        ends = ([], []) if task == "generate" else (["given"], ["truth"])
        ends[0].extend(["bicubic"] if task == "upscale" else [])
        assert list(section["columns"]) == [*ends[0], "steps-1", "steps-2", "steps-4", "many", *ends[1]]
        assert len(section["rows"]) == len(section["commands"]) == 2
        timed = {row["column"]: row["steps"] for row in section["figures"] if row["ms"]}
        many = MANY["generate" if task == "generate" else "same"]
        assert timed == {"steps-1": 1, "steps-2": 2, "steps-4": 4, "many": many}
    assert toured.section("depth")["columns"]["many"] == "same adapter, 5 steps"
    assert toured.section("generate")["columns"]["many"] == "backbone, 6 steps"
    measured = {name: set(toured.section(name)["figures"][-1]) - {"column", "steps", "ms"} for name in TASKS}
    assert measured["canny"] == {"edge_f1", "distance"} and measured["generate"] == set()
    assert {"psnr", "psnr_inside", "psnr_outside"} < measured["edit"] and "known_psnr" not in measured["inpaint"]
    assert toured.told["swap_ms"] > 0 and toured.told["training"]["images"] == TRAINING["images"]


def test_the_page_is_whole_and_needs_no_network(toured):
    tags = Reader(toured.page).tags
    assert "://" not in toured.page and "$" not in toured.page
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) > 80 and all(i["alt"] and (toured.out / i["src"]).is_file() for i in images)
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for tag, a in tags if tag == "a"} <= ids
    ranges = [a for tag, a in tags if tag == "input" and a["type"] == "range"]
    assert ranges and all(a["aria-label"] for a in ranges)
    for _, section in tags:  # what the choices put into sliders
        for column in json.loads(section.get("data-columns") or "{}"):
            assert (toured.out / section["data-name"] / column).is_dir()


def test_pictures_are_of_the_size_and_kind_that_they_should_be(toured):
    assert Image.open(toured.out / "upscale/given/scene-0.png").size == (8, 8)
    assert Image.open(toured.out / "photographs/steps-4/coffee.png").size == (96, 96)
    assert Image.open(toured.out / "gallery.png").height > 6 * 128
    hole = toured.pixels("inpaint/mask/scene-0.png") > 127
    made, truth = toured.pixels("inpaint/steps-1/scene-0.png"), toured.pixels("inpaint/truth/scene-0.png")
    assert 0 < hole.mean() < 1 and (made == truth)[~hole].all() and not (made == truth)[hole].all()


def test_guidance_and_a_second_adapter_change_pictures(toured):
    guided = toured.section("guidance")
    assert [key for key in guided["columns"] if key != "given"] == ["guidance-1", "guidance-2", "guidance-4"]
    assert guided["commands"][0].startswith("codi generate") and "--guidance 4" in guided["commands"][0]
    composed = toured.section("composition")
    assert set(composed["columns"]) == {"given-depth", "given-inpaint", "only-depth", "only-inpaint", "both", "truth"}
    for section, columns in ((guided, ("guidance-1", "guidance-4")), (composed, ("only-inpaint", "both"))):
        one, two = (toured.pixels(section["rows"][0]["pictures"][column]) for column in columns)
        assert np.abs(one - two).max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_the_commands_of_the_page_make_its_pictures_again(toured, capsys, monkeypatch, task):
    section = toured.section(task)
    monkeypatch.chdir(toured.out)
    words = shlex.split(section["commands"][1])
    ran = Shell(capsys)(*words[1:], "--overwrite", "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    again, shown = toured.pixels("again.png"), toured.pixels(section["rows"][1]["pictures"]["steps-4"])
    assert np.abs(again - shown).max() <= 1


def test_the_script_of_the_composition_makes_its_picture_again(toured, monkeypatch):
    monkeypatch.chdir(toured.out)
    section = toured.section("composition")
    exec(section["commands"][0], {})
    shown = toured.pixels(section["rows"][0]["pictures"]["both"])
    assert np.abs(toured.pixels("again.png") - shown).max() <= 1


def test_what_cannot_be_shown_is_named_with_its_reason(capsys, tmp_path, toured, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    adapters = tmp_path / "adapters"
    make_adapter(adapters / "upscale", "upscale")
    make_adapter(adapters / "depth", "canny")
    options = ("--adapters", adapters, "--model", toured.model, "--count", 1, "--minutes", 0, "--device", "cpu")
    ran = Shell(capsys)("demo", "--out", tmp_path / "demo", *options, "--json")
    assert (ran.code, ran.err) == (0, "")
    told, page = json.loads(ran.out), (tmp_path / "demo" / "index.html").read_text()
    assert [s["name"] for s in told["sections"]] == ["upscale"] and told["training"] is None
    assert list(told["skipped"]) == ["inpaint", "depth", "canny", "edit", "generate", "guidance", "composition"]
    assert "this adapter does 'canny'" in told["skipped"]["depth"] and "codi distill edit" in told["skipped"]["edit"]
    assert "scikit-image" in told["note"] and "scikit-image" in page
    Reader(page)
    assert all(f"<b>{name}</b> is not shown" in page for name in told["skipped"])


def test_finetuned_models_are_the_many_step_column_where_there_are_some(toured, tmp_path):
    make_adapter(tmp_path / "canny-finetuned", "canny")
    pipe = CoDiPipeline.from_pretrained(toured.model)
    found = show.Show(pipe, tmp_path, 0, "mini", toured.adapters, tmp_path)
    way, note = found._many("canny")
    assert (way.adapters, way.steps, way.heading) == (("canny-finetuned",), 50, "fine-tuned, 50 steps")
    assert way.guidance == 2.0 and "guidance 2, two passes each" in note  # as the few steps beside it have
    way, note = found._many("depth")
    assert (way.adapters, way.guidance) == (("depth",), None) and "the same adapter in 20 steps, not another" in note


def test_the_number_of_scenes_fits_the_machine(toured, tmp_path, monkeypatch):
    pipe = CoDiPipeline.from_pretrained(toured.model)
    pipe.set_progress_bar_config(disable=True)
    found = show.Show(pipe, tmp_path, 0, "mini", toured.adapters, None)
    for seconds, count in ((0, 2), (1e6, 6)):
        monkeypatch.setattr(show, "SECONDS", seconds)
        assert found.fitting() == count


def test_the_command_for_the_same_page_keeps_what_was_chosen(toured):
    parts = ("codi", "demo", "--out", toured.out, "--count", 2, "--model", toured.model, "--adapters", toured.adapters)
    assert toured.told["command"] == shlex.join([*map(str, parts), "--device", "cpu"])
    assert html.escape(toured.told["command"]) in toured.page
    odd = {"finetuned": Path("my runs"), "minutes": 0.0, "seed": 0, "dtype": "bfloat16"}
    assert demo.repeat_command(**odd) == "codi demo --finetuned 'my runs' --minutes 0.0 --dtype bfloat16"


def test_without_any_adapter_there_is_nothing_to_show(toured, tmp_path):
    with pytest.raises(UserError, match="no adapter of this task is here"):
        show.Show(CoDiPipeline.from_pretrained(toured.model), tmp_path, 0, "mini", tmp_path / "none", None)


def test_the_training_of_the_demo_resumes_where_it_stopped(toured):
    pipe = CoDiPipeline.from_pretrained(toured.model)
    told = train_upscaler(pipe, toured.out, 1, model=str(toured.model), side=32, seed=0, device="cpu", changes=TRAINING)
    assert told == toured.told["training"]
    assert len(told["curve"]) == 4 and all((toured.out / path).is_file() for path in told["previews"])
