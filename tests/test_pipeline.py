"""The pipeline on tiny models: every task, guidance, sizes, and the arguments of callers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from codi.errors import UserError
from codi.sampling.guidance import resolve
from codi.sampling.inputs import to_mask, to_tensor
from codi.sampling.pipeline import CoDiPipeline
from codi.tasks import TASKS
from pipelines import hole, inputs_for, make_folder, open_pipeline, run
from tiny import rand


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def shared(folder) -> CoDiPipeline:
    return open_pipeline(folder)


@pytest.fixture
def pipe(shared) -> CoDiPipeline:
    """Return the pipeline with no adapter set."""
    shared.set_adapters([])
    return shared


# ---- every task


@pytest.mark.parametrize("task", TASKS)
def test_every_task_generates_images(folder, pipe, task):
    pipe.set_adapters(task)
    sizes = [(16, 24), (7, 9)] if task != "generate" else [(32, 32)]  # whole latent cells of 4 px, and parts of them
    for height, width in sizes:
        images = run(pipe, **inputs_for(task, height, width))
        scale = 4 if task == "upscale" else 1
        assert images.shape == (1, 3, scale * height, scale * width) and images.dtype == torch.float32
        assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
        assert torch.equal(run(pipe, **inputs_for(task, height, width)), images)
        assert not torch.allclose(run(pipe, **inputs_for(task, height, width), seed=1), images, atol=1e-3)
    alone = CoDiPipeline.from_pretrained(folder / "model", task=task, adapter=folder / task)
    alone.set_progress_bar_config(disable=True)
    assert torch.equal(run(alone, **inputs_for(task, height, width)), images)
    assert (alone.task.name, pipe.task.name, alone.adapters) == (task, task, [task])  # type: ignore[union-attr]


@pytest.mark.parametrize("task", ["depth", "canny", "generate"])
def test_strength_0_is_the_backbone(pipe, task):
    pipe.set_adapters([])
    size = {"height": 16, "width": 24}
    backbone = run(pipe, **size)
    pipe.set_adapters(task)
    arguments = inputs_for(task) or size
    assert torch.equal(run(pipe, **arguments, strength=0), backbone)
    half, whole = run(pipe, **arguments, strength=0.5), run(pipe, **arguments)
    assert not torch.allclose(half, backbone, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)
    pipe.set_adapters(task, 0.5)
    torch.testing.assert_close(run(pipe, **arguments), half)
    pipe.set_adapters(task, 0)
    assert torch.equal(run(pipe, **arguments), backbone)
    pipe.set_adapters([])
    assert torch.equal(run(pipe, **size), backbone)


def test_strength_0_of_a_full_adapter_is_the_backbone_too(pipe):
    backbone = run(pipe, height=64, width=96)
    pipe.set_adapters("full")
    assert torch.equal(run(pipe, **inputs_for("upscale"), strength=0, colour="none"), backbone)


def test_a_full_adapter_refuses_a_fractional_strength(pipe):
    pipe.set_adapters("full")
    whole = run(pipe, **inputs_for("upscale"))
    for strength in (0.5, 2.0):
        with pytest.raises(UserError, match=f"^strength {strength:g}: full is a full adapter.*use 1 .* or 0"):
            run(pipe, **inputs_for("upscale"), strength=strength)
    with pytest.raises(UserError, match="^weight 0.5: full is a full adapter"):
        pipe.set_adapters("full", 0.5)
    assert torch.equal(run(pipe, **inputs_for("upscale")), whole)
    pipe.set_adapters("full", 0)
    assert not torch.allclose(run(pipe, **inputs_for("upscale"), strength=0.5), whole, atol=1e-3)


def test_known_pixels_are_returned_exactly(pipe):
    pipe.set_adapters("inpaint")
    image, known = rand(2, 3, 15, 22, seed=3), hole(15, 22).expand(2, 3, -1, -1) == 0
    images = run(pipe, image=image, mask=hole(15, 22), strength=0.5)
    assert torch.equal(images[known], image[known])
    assert (images != image)[~known].float().mean() > 0.99  # a pixel may be equal by chance
    nothing, all_ = torch.zeros(15, 22), torch.ones(15, 22)
    assert torch.equal(run(pipe, image=image, mask=nothing), image)
    whole = run(pipe, image=image, mask=all_)
    assert torch.equal(run(pipe, image=1 - image, mask=all_), whole)  # hidden pixels are ignored
    assert torch.equal(run(pipe, image=torch.cat([image, hole(15, 22).expand(2, -1, -1, -1)], 1), strength=0.5), images)


@pytest.mark.parametrize("task", ["depth", "edit", "upscale"])
def test_the_same_seed_gives_the_same_image_in_any_batch(pipe, task):
    pipe.set_adapters(task)
    images, prompts = inputs_for(task, 8, 12, count=3)["image"], ["a red ball", "", "a blue box"]
    together = run(pipe, image=images, prompt=prompts, seed=[4, 9, 4])
    for k, seed in enumerate([4, 9, 4]):
        alone = run(pipe, image=images[k], prompt=prompts[k], seed=seed)
        torch.testing.assert_close(alone, together[k : k + 1], rtol=0, atol=1e-5)
    counted = run(pipe, image=images[0], seed=[7, 8])
    torch.testing.assert_close(run(pipe, image=images[:1].repeat(2, 1, 1, 1), seed=7), counted, rtol=0, atol=1e-5)


def test_text_to_image_takes_a_size(pipe):
    assert run(pipe).shape == (1, 3, 32, 32)
    for name in ([], "generate"):
        pipe.set_adapters(name)
        assert run(pipe, height=20, width=48).shape == (1, 3, 20, 48)
        assert run(pipe, width=48, prompt=["a", "b"]).shape == (2, 3, 32, 48)
        for size, message in (
            ({"height": 18}, "not multiples of 4 px"),
            ({"width": 0}, "0: out"),
            ({"width": -4}, "1 up"),
        ):
            with pytest.raises(UserError, match=message):
                run(pipe, **size)
    pipe.set_adapters("canny")
    with pytest.raises(UserError, match="leave the size out"):
        run(pipe, **inputs_for("canny"), height=20)
    assert run(pipe, **inputs_for("canny"), height=16, width=24).shape == (1, 3, 16, 24)


def test_a_prompt_is_encoded_once_for_all_tiles(pipe):
    pipe.set_adapters("upscale")
    calls = []
    hook = pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    run(pipe, image=rand(1, 3, 16, 16), prompt="a ball", tile=8, steps=1, batch_size=1)
    hook.remove()
    assert len(calls) == 1


def test_only_upscaling_takes_tiles(pipe):
    pipe.set_adapters("upscale")
    image = rand(1, 3, 9, 21)
    images = run(pipe, image=image, tile=8, steps=1)
    assert images.shape == (1, 3, 36, 84)
    torch.testing.assert_close(run(pipe, image=image, tile=8, steps=1, batch_size=1), images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="tile 1: not a multiple of 1 from 2 up"):
        run(pipe, image=image, tile=1)
    with pytest.raises(UserError, match="tile=0"):
        run(pipe, image=image, tile=8, output_type="latent")
    pipe.set_adapters("canny")
    with pytest.raises(UserError, match="only for upscaling"):
        run(pipe, image=image, tile=8)
    with pytest.warns(UserWarning, match="this model was trained at 32"):
        assert run(pipe, image=rand(1, 3, 8, 120), steps=1).shape == (1, 3, 8, 120)


# ---- guidance


def test_bands_join_to_the_whole_image(pipe):
    pipe.set_adapters("upscale")
    arguments = {"image": rand(2, 3, 45, 38), "tile": 16, "seed": 5}
    whole = run(pipe, **arguments)
    for picture, bands in zip(whole, run(pipe, **arguments, output_type="bands"), strict=True):
        parts = list(bands)
        assert len(parts) > 2 and torch.equal(torch.cat(parts, dim=2)[0], picture)
    for wrong in ({"tile": 0}, {"colour": "adain"}):
        with pytest.raises(UserError, match="'bands'"):
            run(pipe, **{**arguments, **wrong}, output_type="bands")


def test_distilled_guidance_is_one_pass_and_kept_within_its_range(pipe):
    pipe.set_adapters("edit")
    calls: list[int] = []
    unet = pipe.student.network
    hook = unet.conv_out.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    plain = run(pipe, **inputs_for("edit"))
    assert torch.equal(run(pipe, **inputs_for("edit"), guidance_scale=1, image_guidance_scale=1), plain)
    strong = run(pipe, **inputs_for("edit"), guidance_scale=5)
    assert not torch.allclose(strong, plain, atol=1e-3)
    assert not torch.allclose(run(pipe, **inputs_for("edit"), image_guidance_scale=2), plain, atol=1e-4)
    with pytest.warns(UserWarning, match=r"guidance of the text 9: 1 to 5 is distilled .*: using 5"):
        assert torch.equal(run(pipe, **inputs_for("edit"), guidance_scale=9), strong)
    assert set(calls) == {1}
    hook.remove()
    with pytest.raises(UserError, match="negative_prompt"):
        run(pipe, **inputs_for("edit"), negative_prompt="blur")
    for empty in ("", [""], ("",), None):
        assert torch.equal(run(pipe, **inputs_for("edit"), negative_prompt=empty), plain)


def test_guidance_that_is_not_distilled_takes_two_passes(pipe):
    pipe.set_adapters("depth")
    calls: list[int] = []
    hook = pipe.student.network.conv_out.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    plain = run(pipe, **inputs_for("depth"))
    assert set(calls) == {1}
    guided = run(pipe, **inputs_for("depth"), guidance_scale=3)
    assert calls[-1] == 2 and not torch.allclose(guided, plain, atol=1e-3)
    assert not torch.equal(run(pipe, **inputs_for("depth"), guidance_scale=3, negative_prompt="a blue box"), guided)
    hook.remove()
    with pytest.raises(UserError, match="image_guidance_scale 1.5: no active adapter has learned it"):
        run(pipe, **inputs_for("depth"), image_guidance_scale=1.5)


def test_guidance_is_resolved_from_arguments_and_adapters():
    distilled = {"guidance": {"text": [1, 5], "image": [1, 2]}, "guidance_scale": 3.0, "image_guidance_scale": 1.2}
    assert resolve(None, None, []).scales == {"text": 1.0}
    assert resolve(None, None, [{"guidance": {}, "guidance_scale": 2.0}]).second_pass == 2.0
    resolved = resolve(None, None, [{}, distilled])
    assert (resolved.scales, resolved.second_pass) == ({"text": 3.0, "image": 1.2}, 1.0)
    assert resolved.columns(["a", "b"]).tolist() == pytest.approx(np.array([[3.0, 1.2]] * 2))  # type: ignore[union-attr]
    assert resolved.columns(["a", ""])[1].tolist() == pytest.approx([1.0, 1.2])  # without a prompt there is no guidance
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(5, 2, [distilled]).scales == {"text": 5.0, "image": 2.0}
        above = [{"guidance": {"text": [2, 4], "image": [1.5, 2]}, "guidance_scale": 2.0, "image_guidance_scale": 1.5}]
        assert resolve(1, 1, above).scales == {
            "text": 1.0,
            "image": 1.0,
        }  # a scale of 1, no guidance, is exact in any range
    with pytest.warns(UserWarning, match="guidance of the text 1.5: 2 to 4 .*: using 2"):
        assert resolve(1.5, 1, above).scales == {"text": 2.0, "image": 1.0}
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="not a guidance scale"):
            resolve(wrong, None, [])


# ---- callbacks, inputs and outputs


def test_callbacks_see_every_step_and_may_replace_the_latents(pipe):
    pipe.set_adapters("canny")
    calls: list[tuple[int, int, list[str]]] = []

    def record(caller, step, t, tensors):
        assert caller is pipe
        calls.append((step, t, sorted(tensors)))

    names = ("latents", "denoised")
    run(pipe, **inputs_for("canny"), callback_on_step_end=record, callback_on_step_end_tensor_inputs=names)
    assert calls == [(0, 1000, ["denoised", "latents"]), (1, 500, ["denoised", "latents"])]

    def blank(caller, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    images = run(pipe, **inputs_for("canny"), callback_on_step_end=blank)
    assert torch.equal(images, run(pipe, **inputs_for("canny"), callback_on_step_end=blank, seed=5))


def test_output_types_hold_the_same_image(pipe):
    pipe.set_adapters("canny")
    expected = run(pipe, **inputs_for("canny"))
    array = run(pipe, **inputs_for("canny"), output_type="np")
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    (picture,) = run(pipe, **inputs_for("canny"), output_type="pil")
    assert isinstance(picture, Image.Image) and picture.size == (24, 16)
    assert run(pipe, **inputs_for("canny"), output_type="latent").shape == (1, 4, 4, 6)
    (images,) = pipe(**inputs_for("canny"), steps=2, prompt="a red ball", output_type="pt", return_dict=False)
    assert torch.equal(images, expected)


def test_seeds_and_prompts_of_several_types_are_accepted(pipe):
    expected = run(pipe, prompt="", seed=3, steps=1)
    for seed in (np.int64(3), np.uint8(3), [3], np.array([3]), torch.tensor([3])):
        assert torch.equal(run(pipe, prompt=None, seed=seed, steps=1), expected)
    two = run(pipe, prompt=["", ""], seed=np.int64(3), steps=1)
    torch.testing.assert_close(two[:1], expected)
    assert torch.equal(run(pipe, guidance_scale=2, negative_prompt=None), run(pipe, guidance_scale=2))


def test_maps_need_no_channel_dimension(pipe):
    for task in ("depth", "canny"):
        pipe.set_adapters(task)
        levels = (rand(16, 24, seed=2).numpy() * 255).astype(np.uint8)
        assert torch.equal(run(pipe, image=levels), run(pipe, image=torch.from_numpy(levels / 255)[None]))


def test_images_and_masks_of_several_types_are_accepted(pipe):
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    for image in (expected, expected[0], levels, levels[None], levels / 255, Image.fromarray(levels)):
        torch.testing.assert_close(to_tensor(image), expected)  # type: ignore[arg-type]
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    torch.testing.assert_close(
        to_tensor(Image.fromarray(deep))[:, :1], torch.from_numpy(deep / 65535.0)[None, None].float()
    )
    torch.testing.assert_close(to_tensor(deep), torch.from_numpy(deep / 65535.0)[None, None].float())
    assert to_tensor(levels[..., 0] > 99).shape == (1, 1, 6, 8)
    assert to_tensor(Image.fromarray(levels[..., 0] > 99)).shape == (1, 1, 6, 8)  # two levels: an edge map
    marks = torch.from_numpy(levels[..., 0] > 99)
    array = marks.numpy()
    for mask in (
        marks, marks[None], marks[None, None], array, array[..., None], array[None, ..., None], [array[..., None]],
        (array * 255).astype(np.uint8)[..., None], Image.fromarray(array), Image.fromarray(array.astype(np.float32)),
    ):  # fmt: skip
        assert torch.equal(to_mask(mask), marks[None, None].float())
    assert torch.equal(to_mask(array[:, :1]), marks[None, None, :, :1].float())  # (6, 1): one pixel wide
    assert torch.equal(to_mask(np.stack([array, ~array])[..., None]), torch.stack([marks, ~marks])[:, None].float())


@pytest.mark.parametrize("most", [1, 255, 65535])
def test_the_range_of_32_bit_images_follows_their_values(most):
    """PIL's modes "F" and "I" do not state their white level."""
    grey = np.linspace(0.0, 1.0, 48).reshape(6, 8)
    for kind in (np.float32, np.int32)[most == 65535 :]:
        levels = (grey * most).round() if kind is np.int32 else grey * most
        picture = Image.fromarray(levels.astype(kind))
        expected = torch.from_numpy(levels / most)[None, None].float()
        torch.testing.assert_close(to_tensor(picture), expected.expand(1, 3, 6, 8))
        torch.testing.assert_close(to_mask(picture), expected)
    levels = np.array([[0, 30_000, 65_535]], dtype=np.uint16)  # always of 16 bits, whatever the values
    torch.testing.assert_close(to_mask(Image.fromarray(levels))[0, 0], torch.tensor([[0, 30_000 / 65535, 1]]))
    assert float(to_tensor(Image.fromarray(levels // 300)).max()) < 0.01


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("depth", {}, "the task 'depth' needs one"),
        ("depth", {"image": torch.full((3, 8, 8), 2.0)}, "outside \\[0, 1\\]"),
        ("depth", {"image": torch.full((3, 8, 8), torch.nan)}, "outside \\[0, 1\\]"),
        ("depth", {"image": rand(1, 3, 8, 8)}, "image: is a colour picture, not a depth map: give a grey one"),
        ("edit", {"image": torch.ones(2, 8)}, r"shape \(2, 8\) is not \(3, h, w\) or \(B, 3, h, w\)"),
        ("edit", {"image": torch.ones(3, 8, 0)}, r"is not \(3, h, w\) or \(B, 3, h, w\)"),
        ("edit", {"image": torch.tensor(1.0)}, r"shape \(\) is not \(3, h, w\)"),
        ("edit", {"image": torch.ones(9, 8, 3, dtype=torch.uint8)}, r"shape \(9, 8, 3\) .*: tensors have .* first"),
        ("edit", {"image": torch.ones(2, 9, 8, 3)}, r"\(2, 9, 8, 3\) is not .*: tensors .*: image.movedim\(-1, -3\)"),
        ("edit", {"image": np.ones((3, 9, 8))}, r"\(3, 9, 8\) is not \(h, w, 3\) .*: np.moveaxis\(image, -3, -1\)"),
        ("edit", {"image": [np.ones((9, 8, 3)), np.ones((3, 9, 8))]}, r"\(3, 9, 8\) is not .*: arrays have .* last"),
        ("edit", {"image": Image.fromarray(np.full((8, 8), 300, np.float32))}, r"outside \[0, 1\]"),
        ("edit", {"image": Image.fromarray(np.full((8, 8), np.nan, np.float32))}, r"outside \[0, 1\]"),
        ("edit", {"image": Image.fromarray(np.full((8, 8), 70_000, np.int32))}, r"outside \[0, 1\]"),
        ("edit", {"image": torch.ones(4, 8, 8)}, "task edit takes pictures"),
        ("edit", {"image": "photo.png"}, "str is no picture"),
        ("edit", {"image": torch.ones(3, 8, 8), "mask": torch.ones(8, 8)}, "mask: .* leave it out"),
        ("inpaint", {"image": torch.ones(3, 8, 8)}, "mask: missing"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": torch.ones(8, 9)}, "mask of 9 x 8 px: the picture has"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": torch.ones(1, 3, 8, 8)}, r"\(1, 3, 8, 8\) .*mask\[:, :1\]"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": torch.ones(3, 8, 8)}, r"\(3, 8, 8\): 3 masks .*mask\[:1\]"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": torch.ones(8, 8, 1)}, r"\(8, 8, 1\): .*mask\[..., 0\]"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": np.ones((8, 8, 3))}, r"\(8, 8, 3\) is not .*mask\[..., 0\]"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": np.ones((1, 8, 8, 3))}, r"\(1, 8, 8, 3\) .*mask\[..., 0\]"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": [np.ones((8, 8))] * 2}, "mask: 2 masks for a batch of 1"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": np.ones((0, 8))}, r"shape \(0, 8\) is not"),
        ("inpaint", {"image": torch.ones(3, 8, 8), "mask": np.array([["a"]])}, "mask: an array of <U1"),
        ("generate", {"image": torch.ones(3, 8, 8)}, "generate takes no picture"),
        (None, {"image": torch.ones(3, 8, 8)}, "no adapter is set"),
        ("canny", {"image": torch.ones(2, 3, 8, 8), "prompt": ["a"] * 3}, "2 images of canny for 3 pictures"),
        ("canny", {"image": torch.ones(2, 3, 8, 8), "seed": [1, 2, 3]}, "for 3 pictures"),
        (None, {"seed": 1.5}, "seed 1.5: not a whole number"),
        (None, {"seed": None}, "seed None: not a whole number"),
        (None, {"seed": [1, "2"]}, "seed .*: not a whole number"),
        (None, {"prompt": ["a", None]}, "prompt None: not a text"),
        (None, {"prompt": 3}, "prompt 3: not a text"),
        (None, {"steps": 0}, "steps 0"),
        (None, {"steps": 1001}, "between 1 and 1000"),
        (None, {"strength": -1.0}, "strength -1.0"),
        (None, {"strength": float("nan")}, "strength nan"),
        (None, {"output_type": "jpeg"}, "'jpeg': not known"),
        (None, {"guidance_scale": -2.0}, "guidance_scale -2.0"),
        (None, {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(pipe, task, arguments, message):
    pipe.set_adapters(task or [])
    with pytest.raises(UserError, match=message):
        run(pipe, **arguments)


def test_an_unknown_task_is_refused(folder):
    with pytest.raises(UserError, match="did you mean 'depth'"):
        CoDiPipeline.from_pretrained(folder / "model", task="dept")


def test_an_image_much_larger_than_the_training_size_is_a_warning(pipe):
    """Except for upscaling, which works in tiles."""
    pipe.set_adapters("edit")
    with pytest.warns(UserWarning, match=r"picture of 128 x 96 px: this model was trained at 32: .* smaller first"):
        pipe(image=rand(3, 96, 128), prompt="make it blue", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(image=rand(3, 96, 96), prompt="make it blue", steps=1)
        pipe.set_adapters("upscale")
        pipe(image=rand(3, 40, 48), steps=1)


def test_a_compiled_pipeline_generates_the_same_images(folder):
    """One graph without a break, also for adapters that are set later."""
    pipe = CoDiPipeline.from_pretrained(folder / "model", "edit", folder / "edit")
    pipe.set_progress_bar_config(disable=True)
    arguments = {"steps": 1, "seed": 3, "image": inputs_for("edit")["image"]}
    plain = run(pipe, **arguments)
    pipe.set_adapters([])
    assert pipe.compile(backend="eager", fullgraph=True) is pipe
    pipe.set_adapters("edit")
    assert torch.equal(run(pipe, **arguments), plain)


def test_a_compiled_pipeline_copies_results_that_cuda_graphs_overwrite(folder, monkeypatch):
    """The next call of any compiled function overwrites the memory of earlier results, here with NaN."""
    results: list[Tensor] = []

    def graph(function: Any, **options: Any) -> Any:
        def replay(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            for old in results:
                old.fill_(torch.nan)
            results[:] = [t for t in tree_leaves(getattr(result, "prepared", result)) if isinstance(t, Tensor)]
            return result

        return replay

    pipe = CoDiPipeline.from_pretrained(folder / "model", "depth", folder / "depth")
    pipe.set_progress_bar_config(disable=True)
    plain = run(pipe, **inputs_for("depth"))
    monkeypatch.setattr(torch, "compile", graph)
    pipe.compile(mode="reduce-overhead")
    images = run(pipe, **inputs_for("depth"))
    assert results and torch.equal(images, plain)


def test_channels_last_applies_to_all_networks(folder):
    plain, laid_out = (CoDiPipeline.from_pretrained(folder / "model", "depth", folder / "depth") for _ in range(2))
    laid_out.to(torch.float32, memory_format=torch.channels_last)
    laid_out.load_adapter(folder / "edit")
    for weights in (laid_out.unet, laid_out.vae, *(adapter.network for adapter in laid_out._store.loaded.values())):
        convolutions = [p for p in weights.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    for pipe in (plain, laid_out):
        pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        run(laid_out, **inputs_for("depth")), run(plain, **inputs_for("depth")), rtol=0, atol=1e-5
    )
