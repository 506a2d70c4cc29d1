"""Mask and depth files of users: every bit depth and color model, and values that are not a depth."""

import math
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, GLPNConfig, GLPNForDepthEstimation

from codi.data.batches import collate
from codi.data.render import render_folder
from codi.data.sources import open_source
from codi.errors import UserError
from codi.tasks import get_task
from codi.tasks.depth import estimate_depth, normalise, read_depth
from codi.tasks.masks import read_mask

HALF = np.zeros((12, 16), np.uint8)
HALF[:, 8:] = 255  # the right half


def save(array: np.ndarray, path: Path, mode: str | None = None) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return path


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_of_every_color_model_are_read_the_same(mode: str, tmp_path: Path):
    array = HALF.astype(np.uint16) * 257 if mode == "I;16" else HALF
    path = save(array, tmp_path / "mask.png", None if mode == "I;16" else mode)
    mask = read_mask(path, (12, 16))
    assert mask.shape == (1, 12, 16) and mask.dtype == torch.float32
    assert torch.equal(mask[0], torch.from_numpy(HALF / 255).float())


def test_marks_on_a_transparent_ground_are_the_mask(tmp_path: Path):
    for colour in ((255, 255, 255), (255, 0, 0), (0, 0, 0)):
        rgba = np.dstack([np.full((12, 16, 3), colour, np.uint8), HALF])
        assert torch.equal(read_mask(save(rgba, tmp_path / "mask.png"), (12, 16))[0], torch.from_numpy(HALF / 255.0))
    grey = np.dstack([np.tile(np.repeat(np.array([0, 255], np.uint8), 6)[:, None, None], (1, 16, 3)), HALF])
    mask = read_mask(save(grey, tmp_path / "mask.png"), (12, 16))[
        0
    ]  # black and white on a transparent ground: white is the mask
    assert mask[6:, 8:].all() and mask.sum() == 48


def test_erased_parts_of_a_photo_are_the_mask(tmp_path: Path):
    photo = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    path = save(np.dstack([photo, HALF]), tmp_path / "photo.png")
    assert torch.equal(read_mask(path, (12, 16))[0], torch.from_numpy(1 - HALF / 255.0))
    with pytest.raises(UserError, match="photo.png: looks like a photo"):
        read_mask(save(photo, tmp_path / "photo.png"), (12, 16))
    with pytest.raises(UserError, match="wholly transparent"):
        read_mask(save(np.dstack([photo, HALF * 0]), tmp_path / "photo.png"), (12, 16))


def test_a_grey_image_as_mask_is_a_warning(tmp_path: Path):
    """A grey photo is cut at one half with a warning; a mask with soft edges gives none."""
    grey = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)
    with pytest.warns(UserWarning, match="mask.png: is grey rather than black and white"):
        mask = read_mask(save(grey, tmp_path / "mask.png"), (12, 16))
    assert torch.equal(mask[0], torch.from_numpy((grey > 127).astype(np.float32)))
    soft = np.repeat(np.array([0] * 7 + [90, 170] + [255] * 7, np.uint8)[None], 12, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mask(save(soft, tmp_path / "mask.png"), (12, 16))


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_file_may_cover_everything_or_nothing(value: int, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = read_mask(save(np.full((8, 8), value, np.uint8), tmp_path / "mask.png"), (16, 16))
    assert (mask == value / 255).all() and mask.shape == (1, 16, 16)


def test_masks_of_zeros_and_ones_are_understood_with_a_warning(tmp_path: Path):
    with pytest.warns(UserWarning, match="has no white"):
        mask = read_mask(save(HALF // 255, tmp_path / "mask.png"), (12, 16))
    assert torch.equal(mask[0], torch.from_numpy(HALF / 255.0))


def test_masks_are_resized_to_the_image_and_keep_thin_marks(tmp_path: Path):
    line = np.zeros((48, 64), np.uint8)
    line[:, 30] = 255
    small = read_mask(save(line, tmp_path / "mask.png"), (12, 16))
    assert small.shape == (1, 12, 16) and small.sum(-1).eq(1).all() and small[0, :, 7].all()
    large = read_mask(save(HALF, tmp_path / "mask.png"), (36, 48))
    assert large[..., 24:].all() and not large[..., :24].any()
    with pytest.raises(UserError, match="mask.png: 16 x 12 px does not fit the picture of 12 x 16"):
        read_mask(tmp_path / "mask.png", (16, 12))
    with pytest.raises(UserError, match="no such file"):
        read_mask(tmp_path / "musk.png", (16, 12))


# --- depth maps ------------------------------------------------------------------------------------------------------

GROUND = np.tile(np.linspace(1.0, 5.0, 12)[::-1, None], (1, 16))  # distances: the bottom is near


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    render_folder(4, folder, size=48, edits=False)
    return folder


def test_rendered_depth_files_equal_the_training_input(rendered: Path):
    samples = open_source(rendered, ("conditioning_image",)).read(range(4), 48)
    expected_maps = get_task("depth").given(collate(list(samples)), torch.Generator())  # type: ignore[arg-type]
    for k, expected in enumerate(expected_maps):
        path = rendered / "depth" / f"{k:06d}.png"
        depth = read_depth(path, near="dark")
        assert torch.equal(depth, expected) and depth.dtype == torch.float32
        with pytest.warns(UserWarning, match=r"took dark as near .*--near"):
            assert torch.equal(read_depth(path), expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32, np.uint16])
@pytest.mark.parametrize("shape", [(12, 16), (1, 12, 16), (12, 16, 1)])
def test_depth_arrays_of_any_type_range_and_layout_are_read(kind, shape: tuple, tmp_path: Path):
    np.save(tmp_path / "depth.npy", (GROUND * 1000).astype(kind).reshape(shape))
    depth = read_depth(tmp_path / "depth.npy", near="dark")
    assert depth.shape == (1, 12, 16) and depth.aminmax() == (0, 1) and depth[0, -1, 0] == 1
    assert torch.allclose(depth[0, :, 0], torch.tensor((1 / GROUND[:, 0] - 0.2) / 0.8).float(), atol=1e-3)
    assert read_depth(tmp_path / "depth.npy", near="bright")[0, 0, 0] == 1


def test_eight_bit_maps_are_brightness_levels(tmp_path: Path):
    levels = np.tile(np.linspace(10, 210, 12).astype(np.uint8)[:, None], (1, 16))
    expected = torch.tensor((levels - 10.0) / 200).float()[None]
    for path in (save(levels, tmp_path / "d.png"), save(levels, tmp_path / "p.png", "P"), tmp_path / "d.npy"):
        if path.suffix == ".npy":
            np.save(path, levels)
        assert torch.allclose(read_depth(path, near="bright"), expected, atol=1e-6)
        assert torch.allclose(read_depth(path, near="dark"), 1 - expected, atol=1e-6)
        with pytest.warns(UserWarning, match="took bright as near .its lower part is brighter"):
            assert torch.allclose(read_depth(path), expected, atol=1e-6)
    with pytest.warns(UserWarning, match="took dark"):
        read_depth(save(255 - levels, tmp_path / "d.png"))


def test_zeros_of_dark_maps_are_farthest(tmp_path: Path):
    levels = np.array([[0, 50, 100], [0, 150, 250]], np.uint8)
    expected = torch.tensor([[0, 1, 0.75], [0, 0.5, 0]])
    assert torch.allclose(read_depth(save(levels, tmp_path / "d.png"), near="dark")[0], expected)


def test_transparent_pixels_are_unknown(tmp_path: Path):
    ramp = np.tile(np.linspace(50, 200, 12).astype(np.uint8)[:, None], (1, 16))
    rgba = np.dstack([ramp, ramp, ramp, HALF])
    depth = read_depth(save(rgba, tmp_path / "d.png"), near="bright")
    assert not depth[..., :8].any() and depth[0, -1, -1] == 1


def test_invalid_depths_are_farthest(tmp_path: Path):
    array = GROUND.copy()
    array[0, :5] = 0, math.nan, math.inf, -math.inf, -2
    np.save(tmp_path / "d.npy", array)
    depth = read_depth(tmp_path / "d.npy", near="dark")
    assert depth.isfinite().all() and not depth[0, 0, :5].any() and depth.amax() == 1
    assert read_depth(tmp_path / "d.npy", near="bright").isfinite().all()
    with pytest.warns(UserWarning, match="took dark"):
        read_depth(tmp_path / "d.npy")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_maps_without_any_depth_are_refused(value: float, tmp_path: Path):
    np.save(tmp_path / "d.npy", np.full((4, 4), value))
    with pytest.raises(UserError, match="d.npy: holds no depth"):
        read_depth(tmp_path / "d.npy", near="dark")


@pytest.mark.filterwarnings("ignore:.*as near")
@pytest.mark.parametrize("near", ["bright", "dark", "guess"])
def test_constant_maps_are_a_warning(near: str, tmp_path: Path):
    cv2.imwrite(str(tmp_path / "d.png"), np.full((4, 4), 3000, np.uint16))
    with pytest.warns(UserWarning, match="d.png: is constant"):
        depth = read_depth(tmp_path / "d.png", near=near)
    assert (depth == 1).all()


def test_files_that_are_not_depth_maps_are_one_line_errors(tmp_path: Path):
    cases = {
        "colour.png": "colour picture, not a depth map",
        "three.npy": r"shape \(4, 4, 3\): give one number a pixel",
        "text.npy": "cannot be read",
        "words.npy": "array of <U1",
        "empty.npy": r"shape \(0, 4\): give one number a pixel|cannot be read",
        "objects.npy": "cannot be read",
        "missing.npy": "no such file",
        "pipe.npy": "is not a regular file",
        "huge.npy": "40000 x 40000 pixels, above the limit",
        "missing.png": "no such file",
    }
    save(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), tmp_path / "colour.png")
    np.save(tmp_path / "three.npy", np.zeros((4, 4, 3)))
    (tmp_path / "text.npy").write_text("0 1 2")
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    os.mkfifo(tmp_path / "pipe.npy")
    with (tmp_path / "huge.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (40_000, 40_000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 40_000**2)  # a sparse file takes no space on the disk
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"{name}: .*{message}") as error:
            read_depth(tmp_path / name, near="dark")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="near=far"):
        read_depth(tmp_path / "three.npy", near="far")


# --- estimated depth -------------------------------------------------------------------------------------------------


def dpt() -> DPTForDepthEstimation:
    config = DPTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, is_hybrid=False,
    )  # fmt: skip
    return DPTForDepthEstimation(config)


def glpn() -> GLPNForDepthEstimation:
    sizes = [4, 4, 4, 4]
    return GLPNForDepthEstimation(
        GLPNConfig(hidden_sizes=sizes, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=4)
    )


@pytest.mark.parametrize("kind, processor", [(dpt, "DPTImageProcessor"), (glpn, "GLPNImageProcessor")])
def test_depth_is_estimated_by_a_model_in_hub_layout(kind, processor: str, tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind().save_pretrained(tmp_path)
    size = '"size": {"height": 32, "width": 32}, ' if kind is dpt else ""
    (tmp_path / "preprocessor_config.json").write_text(f'{{{size}"image_processor_type": "{processor}"}}')
    picture = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    depth = estimate_depth(picture, str(tmp_path))
    assert depth.shape == (1, 64, 96) and depth.aminmax() == (0, 1)
    assert torch.equal(normalise(depth), depth)


def test_an_unavailable_model_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no depth estimator") as error:
        estimate_depth(torch.zeros(3, 8, 8), str(tmp_path))
    assert "\n" not in str(error.value)

    def offline(*_):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection or see how to run")

    monkeypatch.setattr("codi.tasks.depth._estimator", offline)
    with pytest.raises(UserError, match=r"\(We couldn't connect to 'https://huggingface.co'\): give"):
        estimate_depth(torch.zeros(3, 8, 8), "a/b")
