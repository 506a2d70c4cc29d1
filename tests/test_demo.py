"""`codi demo` on tiny models: it shows every task on one offline page and names what it could not show."""

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
    """Save an adapter with nonzero weights, and with distilled guidance if its task takes a prompt."""
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
class Demo:
    """A finished demo: its folder, result dict and HTML page."""

    out: Path
    model: Path
    adapters: Path
    result: dict
    page: str

    def section(self, name: str) -> dict:
        return next(s for s in self.result["sections"] if s["name"] == name)

    def pixels(self, file: str) -> np.ndarray:
        return np.asarray(Image.open(self.out / file).convert("RGB"), int)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("tour")
    model, adapters, out = tiny_checkpoint(folder / "model"), folder / "adapters", folder / "demo"
    for name in TASKS:
        make_adapter(adapters / name, name)
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "MANY_STEPS", MANY)
        result = demo.make_gallery(
            pipe, out, model=str(model), adapters=adapters, count=2, device="cpu", photographs={"coffee": "coffee"},
            changes=TRAINING, say=lambda line: None,
        )  # fmt: skip
    return Demo(out, model, adapters, result, (out / "index.html").read_text())


class Reader(HTMLParser):
    """Collects tags and checks that they are closed in order."""

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


def test_every_task_is_shown_at_few_and_many_steps_beside_the_ground_truth(finished):
    assert finished.result == json.loads((finished.out / "timings.json").read_text())
    assert finished.result["skipped"] == {}
    names = [s["name"] for s in finished.result["sections"]]
    assert names == ["upscale", "photographs", *list(TASKS)[1:], "guidance", "composition"]
    for task in TASKS:
        section = finished.section(task)
        ends = ([], []) if task == "generate" else (["given"], ["truth"])
        ends[0].extend(["bicubic"] if task == "upscale" else [])
        assert list(section["columns"]) == [*ends[0], "steps-1", "steps-2", "steps-4", "many", *ends[1]]
        assert len(section["rows"]) == len(section["commands"]) == 2
        timed = {row["column"]: row["steps"] for row in section["figures"] if row["ms"]}
        many = MANY["generate" if task == "generate" else "same"]
        assert timed == {"steps-1": 1, "steps-2": 2, "steps-4": 4, "many": many}
    assert finished.section("depth")["columns"]["many"] == "same adapter, 5 steps"
    assert finished.section("generate")["columns"]["many"] == "backbone, 6 steps"
    measured = {name: set(finished.section(name)["figures"][-1]) - {"column", "steps", "ms"} for name in TASKS}
    assert measured["canny"] == {"edge_f1", "distance"} and measured["generate"] == set()
    assert {"psnr", "psnr_inside", "psnr_outside"} < measured["edit"] and "known_psnr" not in measured["inpaint"]
    assert finished.result["swap_ms"] > 0 and finished.result["training"]["images"] == TRAINING["images"]


def test_page_is_complete_and_needs_no_network(finished):
    tags = Reader(finished.page).tags
    assert "://" not in finished.page and "$" not in finished.page
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) > 80 and all(i["alt"] and (finished.out / i["src"]).is_file() for i in images)
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for tag, a in tags if tag == "a"} <= ids
    ranges = [a for tag, a in tags if tag == "input" and a["type"] == "range"]
    assert ranges and all(a["aria-label"] for a in ranges)
    for _, section in tags:  # sources of the image sliders
        for column in json.loads(section.get("data-columns") or "{}"):
            assert (finished.out / section["data-name"] / column).is_dir()


def test_images_have_the_expected_sizes_and_inpainting_keeps_known_pixels(finished):
    assert Image.open(finished.out / "upscale/given/scene-0.png").size == (8, 8)
    assert Image.open(finished.out / "photographs/steps-4/coffee.png").size == (96, 96)
    assert Image.open(finished.out / "gallery.png").height > 6 * 128
    hole = finished.pixels("inpaint/mask/scene-0.png") > 127
    output, truth = finished.pixels("inpaint/steps-1/scene-0.png"), finished.pixels("inpaint/truth/scene-0.png")
    assert 0 < hole.mean() < 1 and (output == truth)[~hole].all() and not (output == truth)[hole].all()


def test_guidance_and_a_second_adapter_change_images(finished):
    guided = finished.section("guidance")
    assert [key for key in guided["columns"] if key != "given"] == ["guidance-1", "guidance-2", "guidance-4"]
    assert guided["commands"][0].startswith("codi generate") and "--guidance 4" in guided["commands"][0]
    composed = finished.section("composition")
    assert set(composed["columns"]) == {"given-depth", "given-inpaint", "only-depth", "only-inpaint", "both", "truth"}
    for section, columns in ((guided, ("guidance-1", "guidance-4")), (composed, ("only-inpaint", "both"))):
        one, two = (finished.pixels(section["rows"][0]["pictures"][column]) for column in columns)
        assert np.abs(one - two).max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_commands_on_the_page_reproduce_its_images(finished, capsys, monkeypatch, task):
    section = finished.section(task)
    monkeypatch.chdir(finished.out)
    command = shlex.split(section["commands"][1])
    ran = Shell(capsys)(*command[1:], "--overwrite", "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    repeated, expected = finished.pixels("again.png"), finished.pixels(section["rows"][1]["pictures"]["steps-4"])
    assert np.abs(repeated - expected).max() <= 1


def test_composition_script_on_the_page_reproduces_its_image(finished, monkeypatch):
    monkeypatch.chdir(finished.out)
    section = finished.section("composition")
    exec(section["commands"][0], {})
    expected = finished.pixels(section["rows"][0]["pictures"]["both"])
    assert np.abs(finished.pixels("again.png") - expected).max() <= 1


def test_page_names_skipped_sections_with_the_reason(capsys, tmp_path, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    adapters = tmp_path / "adapters"
    make_adapter(adapters / "upscale", "upscale")
    make_adapter(adapters / "depth", "canny")
    options = ("--adapters", adapters, "--model", finished.model, "--count", 1, "--minutes", 0, "--device", "cpu")
    ran = Shell(capsys)("demo", "--out", tmp_path / "demo", *options, "--json")
    assert (ran.code, ran.err) == (0, "")
    result, page = json.loads(ran.out), (tmp_path / "demo" / "index.html").read_text()
    assert [s["name"] for s in result["sections"]] == ["upscale"] and result["training"] is None
    assert list(result["skipped"]) == ["inpaint", "depth", "canny", "edit", "generate", "guidance", "composition"]
    assert (
        "this adapter does 'canny'" in result["skipped"]["depth"] and "codi distill edit" in result["skipped"]["edit"]
    )
    assert "scikit-image" in result["note"] and "scikit-image" in page
    Reader(page)
    assert all(f"<b>{name}</b> is not shown" in page for name in result["skipped"])


def test_many_step_column_uses_finetuned_adapters_if_present(finished, tmp_path):
    make_adapter(tmp_path / "canny-finetuned", "canny")
    pipe = CoDiPipeline.from_pretrained(finished.model)
    tour = show.Show(pipe, tmp_path, 0, "mini", finished.adapters, tmp_path)
    method, note = tour._many("canny")
    assert (method.adapters, method.steps, method.heading) == (("canny-finetuned",), 50, "fine-tuned, 50 steps")
    assert method.guidance == 2.0 and "guidance 2, two passes each" in note  # the guidance of the few-step columns
    method, note = tour._many("depth")
    assert (method.adapters, method.guidance) == (
        ("depth",),
        None,
    ) and "the same adapter in 20 steps, not another" in note


def test_scene_count_adapts_to_the_machine(finished, tmp_path, monkeypatch):
    pipe = CoDiPipeline.from_pretrained(finished.model)
    pipe.set_progress_bar_config(disable=True)
    tour = show.Show(pipe, tmp_path, 0, "mini", finished.adapters, None)
    for seconds, count in ((0, 2), (1e6, 6)):
        monkeypatch.setattr(show, "SECONDS", seconds)
        assert tour.fitting() == count


def test_command_on_the_page_keeps_the_chosen_options(finished):
    parts = (
        "codi",
        "demo",
        "--out",
        finished.out,
        "--count",
        2,
        "--model",
        finished.model,
        "--adapters",
        finished.adapters,
    )
    assert finished.result["command"] == shlex.join([*map(str, parts), "--device", "cpu"])
    assert html.escape(finished.result["command"]) in finished.page
    options = {"finetuned": Path("my runs"), "minutes": 0.0, "seed": 0, "dtype": "bfloat16"}
    assert demo.repeat_command(**options) == "codi demo --finetuned 'my runs' --minutes 0.0 --dtype bfloat16"


def test_demo_without_adapters_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="no adapter of this task is here"):
        show.Show(CoDiPipeline.from_pretrained(finished.model), tmp_path, 0, "mini", tmp_path / "none", None)


def test_demo_training_resumes(finished):
    pipe = CoDiPipeline.from_pretrained(finished.model)
    training = train_upscaler(
        pipe, finished.out, 1, model=str(finished.model), side=32, seed=0, device="cpu", changes=TRAINING
    )
    assert training == finished.result["training"]
    assert len(training["curve"]) == 4 and all((finished.out / path).is_file() for path in training["previews"])
