"""Adapters of a pipeline: combining, swapping, naming, saving and loading them."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from codi.errors import UserError
from codi.models.lora import add_lora, lora_names
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS, get_task
from pipelines import hole, inputs_for, make_folder, open_pipeline, run
from shell import make_adapter
from tiny import rand

BLANK = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def shared(folder) -> CoDiPipeline:
    return open_pipeline(folder)


@pytest.fixture
def pipe(shared) -> CoDiPipeline:
    """The shared pipeline with no adapter set."""
    shared.set_adapters([])
    return shared


def test_two_adapters_combine_by_weight(pipe):
    pipe.set_adapters(["depth", "inpaint"])
    images = {"depth": rand(1, 1, 16, 24, seed=2), "inpaint": rand(1, 3, 16, 24, seed=3)}
    both = run(pipe, image=images, mask=hole(16, 24))
    known = hole(16, 24).expand(1, 3, -1, -1) == 0
    assert torch.equal(both[known], images["inpaint"][known])
    for name, arguments in (
        ("depth", {"image": images["depth"]}),
        ("inpaint", {"image": images["inpaint"], "mask": hole(16, 24)}),
    ):
        pipe.set_adapters(["depth", "inpaint"], [float(name == "depth"), float(name == "inpaint")])
        weighted = run(pipe, image=images, mask=hole(16, 24))
        pipe.set_adapters(name)
        condition = torch.cat([images["inpaint"], hole(16, 24)], 1)
        alone = get_task("inpaint").finish(run(pipe, **arguments), condition)
        assert not torch.allclose(weighted[~known], both[~known], atol=1e-3)
        torch.testing.assert_close(weighted[~known], alone[~known], rtol=0, atol=1e-4)
    pipe.set_adapters(["depth", "generate"])
    assert run(pipe, image=images["depth"]).shape == (1, 3, 16, 24)
    pipe.set_adapters(["canny", "upscale"], [0.5, 1])
    edges = (rand(1, 1, 32, 32) > 0.9).float()
    assert run(pipe, image={"canny": edges, "upscale": rand(1, 3, 8, 8)}).shape == (1, 3, 32, 32)


def test_fuse_lora_keeps_images_and_unfuse_lora_restores_weights(pipe):
    image = rand(1, 1, 16, 24, seed=2)
    both = {"depth": image, "inpaint": rand(1, 3, 16, 24, seed=3)}
    for names, arguments in (
        ("depth", {"image": image}),
        (["depth", "inpaint"], {"image": both, "mask": hole(16, 24)}),
    ):
        pipe.set_adapters(names)
        backbone = run(pipe, **arguments, strength=0)
        unfused = {strength: run(pipe, **arguments, strength=strength) for strength in (1.0, 0.5)}
        pipe.fuse_lora()
        for strength, expected in unfused.items():
            torch.testing.assert_close(run(pipe, **arguments, strength=strength), expected, rtol=0, atol=1e-4)
        assert lora_names(pipe.student.network) == []
        assert torch.equal(run(pipe, **arguments, strength=0), backbone)
        pipe.unfuse_lora()
        assert torch.equal(run(pipe, **arguments), unfused[1.0]) and lora_names(pipe.student.network) != []


def test_inpainting_keeps_known_pixels_exact_beside_other_adapters(pipe):
    images = {"inpaint": rand(1, 3, 32, 32, seed=3), "upscale": rand(1, 3, 8, 8, seed=4)}  # upscale corrects colors
    known = hole(32, 32).expand(1, 3, -1, -1) == 0
    for names in (["inpaint", "upscale"], ["upscale", "inpaint"]):
        pipe.set_adapters(names)
        output = run(pipe, image=images, mask=hole(32, 32))
        assert torch.equal(output[known], images["inpaint"][known])


def test_invalid_combinations_are_refused_and_change_nothing(pipe):
    pipe.set_adapters(["canny", "upscale"])
    for names, message in (
        (["full", "depth"], "full"),
        (["depth", "cany"], "did you mean 'canny'"),
        (["depth", "depth"], "give one each"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.set_adapters(names)
    for names in (None, 3, [["canny"]], {"canny": 0.3}):
        with pytest.raises(UserError, match="not the name of an adapter"):
            pipe.set_adapters(names)
    for weights in ("x", torch.tensor(0.5), object(), [None], {"canny": 0.5}):
        with pytest.raises(UserError, match="weights .*not numbers"):
            pipe.set_adapters("canny", weights)
    with pytest.raises(UserError, match="not an adapter: pass a name"):
        pipe.load_adapter(3)
    with pytest.raises(UserError, match="3 weights for 2"):
        pipe.set_adapters(["canny", "depth"], [1, 1, 1])
    assert list(pipe.tasks) == ["canny", "upscale"]
    pipe.set_adapters(["canny", "upscale"], 0.5)  # one weight applies to all, as in diffusers
    assert pipe._store.weights == {"canny": 0.5, "upscale": 0.5}
    image = rand(1, 3, 8, 8)
    for arguments, message in (
        ({"image": image}, "canny, upscale take one each"),
        ({"image": {"canny": image}}, "'upscale' needs one"),
        ({"image": {"canny": image, "upscale": image}}, r"would differ in size \(canny 8 x 8 px, upscale 32 x 32 px"),
        ({"image": {"canny": image, "upscale": image, "edit": image}}, "'edit' is no adapter that is set"),
        ({"image": {"canny": image, "upscale": image}, "mask": torch.ones(8, 8)}, "takes none|take none"),
    ):
        with pytest.raises(UserError, match=message):
            run(pipe, **arguments)


def test_adapters_swap_without_reading_files(folder, pipe, monkeypatch):
    monkeypatch.setattr("codi.sampling.adapter_store.load_adapter", None)
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    began = time.perf_counter()
    for task in TASKS:
        pipe.set_adapters(task)
        assert pipe.student.adapter is pipe.adapter
    assert (time.perf_counter() - began) / len(TASKS) < 0.1
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())
    unet_parameters = {id(p) for p in pipe.unet.parameters()}
    pipe.set_adapters("depth")
    assert unet_parameters <= {id(p) for p in pipe.student.network.parameters()}  # one backbone in memory
    assert pipe.load_adapter(folder / "depth") == "depth"  # loaded already


def test_attention_processors_of_backbone_and_adapter_are_separate(folder):
    """As documented for the pipeline, an adapter with low-rank updates has its own modules."""
    pipe = open_pipeline(folder)
    pipe.set_adapters("depth")
    used: list[str] = []

    class RecordingProcessor(AttnProcessor):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __call__(self, *args, **kwargs):
            used.append(self.name)
            return super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(RecordingProcessor("backbone"))
    pipe.student.network.set_attn_processor(RecordingProcessor("adapter"))
    run(pipe, **inputs_for("depth"))
    assert set(used) == {"adapter"}
    used.clear()
    run(pipe, **inputs_for("depth"), strength=0)
    assert set(used) == {"backbone"}


def test_adapters_are_named_by_folder_or_as_(folder, tmp_path):
    pipe = CoDiPipeline.from_pretrained(folder / "model")
    assert (pipe.adapters, pipe.task, pipe.adapter) == ([], None, None)
    assert pipe.load_adapter(folder / "canny") == "canny" and pipe.task.name == "canny"  # type: ignore[union-attr]
    assert pipe.load_adapter(folder / "depth", as_="relief") == "relief" and list(pipe.tasks) == ["canny"]
    second = make_adapter(tmp_path / "canny", "canny")
    with pytest.raises(UserError, match="is loaded already: name this one with as_"):
        pipe.load_adapter(second)
    assert pipe.load_adapter(second, as_="other") == "other"
    with pytest.raises(UserError, match="does 'depth', not 'canny'"):
        pipe.load_adapter(folder / "depth", as_="mine", task="canny")
    assert pipe.adapters == ["canny", "relief", "other"]


def test_saved_pipeline_reloads_its_adapters_and_weights(folder, tmp_path):
    pipe = CoDiPipeline.from_pretrained(folder / "model", task="upscale", adapter=folder / "full")
    pipe.load_adapter(folder / "depth")
    pipe.load_adapter(folder / "inpaint")
    pipe.set_progress_bar_config(disable=True)
    pipe.set_adapters(["depth", "inpaint"], [1.0, 0.5])
    arguments = {"image": {"depth": rand(1, 1, 8, 8), "inpaint": rand(1, 3, 8, 8)}, "mask": hole(8, 8)}
    output = run(pipe, **arguments)
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    reloaded = CoDiPipeline.from_pretrained(saved)
    reloaded.set_progress_bar_config(disable=True)
    assert set(reloaded.adapters) == {"full", "depth", "inpaint"} and list(reloaded.tasks) == ["depth", "inpaint"]
    assert torch.equal(run(reloaded, **arguments), output)
    reloaded.save_pretrained(saved)  # over its own folder
    of_task = CoDiPipeline.from_pretrained(saved, task="upscale")
    of_task.set_progress_bar_config(disable=True)
    pipe.set_adapters("full")
    assert list(of_task.tasks) == ["full"] and not list(saved.glob(".*"))
    assert torch.equal(run(of_task, **inputs_for("upscale")), run(pipe, **inputs_for("upscale")))
    assert isinstance(StableDiffusionPipeline.from_pipe(reloaded, **BLANK), StableDiffusionPipeline)
    (saved / "adapters" / "set.json").write_text("[")
    with pytest.raises(UserError, match="not a saved pipeline's list"):
        CoDiPipeline.from_pretrained(saved)


def test_pipeline_runs_in_bfloat16_and_converts_to_float32(folder):
    pipe = CoDiPipeline.from_pretrained(folder / "model", torch_dtype=torch.bfloat16)
    for task in ("inpaint", "generate"):
        pipe.load_adapter(folder / task)
        pipe.set_adapters(task)
        assert run(pipe, **inputs_for(task)).dtype == torch.float32
    pipe.to(torch.float32)
    assert {p.dtype for p in pipe.student.parameters()} == {torch.float32}
    assert run(pipe).isfinite().all()


def test_embedded_adapter_is_chosen_by_the_backbones_weights(tmp_path):
    photo = CoDiPipeline.from_pretrained("photo")
    photo.save_pretrained(tmp_path / "copy")
    halves, rounded = (
        CoDiPipeline.from_pretrained(tmp_path / "copy", torch_dtype=dtype) for dtype in (torch.float16, torch.bfloat16)
    )
    rounded.save_pretrained(tmp_path / "rounded")
    reloaded = CoDiPipeline.from_pretrained(tmp_path / "rounded")
    assembled, styled = (CoDiPipeline(**CoDiPipeline.from_pretrained("photo").components) for _ in range(2))
    styled.unet = add_lora(styled.unet, 1, "style")
    offloaded = CoDiPipeline(**photo.components)
    cpu_offload(offloaded.unet, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pipe in (
            CoDiPipeline.from_pretrained(tmp_path / "copy"),
            halves,
            rounded,
            reloaded,
            assembled,
            styled,
            offloaded,
        ):
            pipe.load_adapter("upscale")
            assert pipe._store.loaded["upscale"].info["backbone"] == "7a511383d338"
        mini = CoDiPipeline.from_pretrained("mini")
        mini.load_adapter("upscale")
        assert mini._store.loaded["upscale"].info["backbone"] == "b4af44ec249d"
    tuned = CoDiPipeline(**mini.components)
    with torch.no_grad():
        next(tuned.unet.parameters()).add_(0.1)
    with pytest.warns(
        UserWarning, match=r"depth: .* backbone b4af44ec249d \(.*\), and the weights .* are [0-9a-f]{12}"
    ):
        tuned.load_adapter("depth")
