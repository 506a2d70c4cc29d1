"""The contract that every task keeps: input, condition, result and measures; then each task's own behavior."""

import json
import math

import numpy as np
import pytest
import torch

from codi.data.batches import Batch, collate
from codi.data.sources import open_source
from codi.errors import UserError
from codi.tasks import TASKS, get_task, means
from codi.tasks.base import region_psnr
from codi.tasks.blending import membrane
from codi.tasks.canny import edge_f1, edges
from codi.tasks.depth import depth_jumps, disparity, normalise
from codi.tasks.inpaint import Inpaint
from codi.tasks.masks import KINDS, draw_masks

SIDE = 64
NAMES = sorted(TASKS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return rendered scenes with every column."""
    source = open_source("scenes:held-out:6", ("conditioning_image", "mask", "edited_image"))
    return collate(list(source.read(range(6), SIDE)))  # type: ignore[arg-type]


# --- all tasks -------------------------------------------------------------------------------------------------------


def test_the_six_tasks_exist():
    assert set(TASKS) >= {"upscale", "inpaint", "depth", "canny", "edit", "generate"}
    assert all(task.__doc__ and task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", NAMES)
def test_input_condition_and_result_have_matching_shapes(name: str, batch: Batch):
    task = get_task(name)
    given = task.given(batch, generator())
    condition = task.condition(given)
    truth = task.truth(batch)
    assert condition.shape == (6, task.condition_channels, SIDE, SIDE) and truth.shape == (6, 3, SIDE, SIDE)
    assert given.shape[-1] * task.scale == SIDE
    for image in (given, condition):
        assert image.dtype == torch.float32 and ((image >= 0) & (image <= 1)).all()
    assert task.finish(truth, given).shape == truth.shape
    assert torch.equal(task.bring(given), given)  # the input made from data is valid user input too


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_seeded_and_samples_are_independent(name: str, batch: Batch):
    task = get_task(name)
    given = task.given(batch, generator(5))
    assert torch.equal(given, task.given(batch, generator(5)))
    first = Batch(batch.image[:2], batch.text[:2], {k: v[:2] for k, v in batch.extras.items()})
    assert torch.equal(task.given(first, generator(5)), given[:2])


@pytest.mark.parametrize("name", NAMES)
def test_obedience_has_named_figures_per_sample_and_prefers_the_truth(name: str, batch: Batch):
    task = get_task(name)
    given, truth = task.given(batch, generator()), task.truth(batch)
    good, bad = task.obedience(truth, given, batch), task.obedience(1 - truth.flip(-1), given, batch)
    assert list(good) == list(bad) and all(values.shape == (6,) for values in good.values())
    assert bool(good) == bool(task.obedience_unit)  # a task with figures has a unit
    for figure, mean in means(good).items():
        assert mean > means(bad)[figure]


@pytest.mark.parametrize("name", NAMES)
def test_config_rebuilds_the_task(name: str):
    task = get_task(name)
    assert get_task(name, **json.loads(json.dumps(task.config()))) == task
    with pytest.raises(AttributeError):
        task.scale = 3  # dataclasses are frozen


@pytest.mark.parametrize("name", NAMES)
def test_prompts_come_from_the_tasks_own_column(name: str, batch: Batch):
    prompts = get_task(name).prompts(batch)
    assert prompts == {"upscale": [""] * 6, "edit": batch.instruction}.get(name, batch.text)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_without_masks_refuse_them(name: str, batch: Batch):
    task = get_task(name)
    given, mask = task.given(batch, generator()), torch.ones(6, 1, SIDE, SIDE)
    if task.takes_mask:
        assert task.bring(given[:, :3], mask).shape == given.shape
    else:
        with pytest.raises(UserError, match=f"mask: task {name} takes none"):
            task.bring(given, mask)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_need_only_their_columns(name: str, batch: Batch):
    task = get_task(name, **({"masks": ["objects"]} if name == "inpaint" else {}))
    needed = {k: batch.extras[k] for k in task.columns}
    bare = Batch(batch.image, batch.text, needed, instruction=batch.instruction)
    task.obedience(task.truth(bare), task.given(bare, generator()), bare)
    if needed:
        bare.extras = {}
        with pytest.raises(UserError, match=f"{task.columns[0]}: task {name} needs this column"):
            task.given(bare, generator())
            task.truth(bare)


@pytest.mark.parametrize("name", ["upscale", "inpaint", "depth", "canny", "edit", "generate"])
def test_tensors_that_are_not_images_are_refused(name: str):
    for shape in ((1, 2, 8, 8), (3, 8, 8)):
        with pytest.raises(UserError, match="of shape|missing"):
            get_task(name).bring(torch.zeros(shape))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("depht", {}, "did you mean 'depth'"),
        ("canny", {"low": 200, "high": 100}, "low=200: above high=100"),
        ("canny", {"high": 300}, "high=300: not an edge threshold"),
        ("canny", {"low": "10"}, "low=10: not an edge threshold"),
        ("canny", {"hihg": 3}, "did you mean 'high'"),
        ("canny", {"jitter": -1}, "jitter=-1: below 0"),
        ("depth", {"soften": 2}, "soften=2: not a share"),
        ("inpaint", {"masks": ["box"]}, "masks=box: unknown kind.*did you mean 'boxes'"),
        ("inpaint", {"masks": []}, "masks: none"),
        ("depth", {"near": "brigth"}, "did you mean 'bright'"),
        ("edit", {"scale": 2}, "scale: unknown option of task edit: it has none"),
    ],
)
def test_wrong_options_are_one_clear_line(name: str, options: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        get_task(name, **options)
    assert "\n" not in str(error.value)


def test_means_ignore_nan():
    nan = math.nan
    assert means({"a": torch.tensor([1.0, nan, 3.0]), "b": torch.tensor([nan, nan])}) == {"a": 2.0}


def test_region_psnr_ignores_pixels_outside():
    truth, region = torch.full((3, 3, 4, 4), 0.5), torch.zeros(3, 1, 4, 4)
    region[0, :, :2] = region[1] = 1
    output = truth.clone()
    output[0, :, :2] += 0.1  # 20 dB inside the region
    output[0, :, 2:] = 1
    figures = region_psnr(output, truth, region)
    assert figures[:2].tolist() == pytest.approx([20, 60], abs=1e-3) and figures[2].isnan()


# --- inpaint ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_are_binary_seeded_and_varied(kind: str, batch: Batch):
    seeds, ids = list(range(60)), batch.extras["mask"].repeat(10, 1, 1, 1)
    masks = draw_masks([kind], SIDE, SIDE, seeds, ids)
    assert masks.shape == (60, 1, SIDE, SIDE) and set(masks.unique().tolist()) == {0, 1}
    assert torch.equal(masks[7:9], draw_masks([kind], SIDE, SIDE, seeds[7:9], ids[7:9]))
    covered = masks.mean((1, 2, 3))
    assert len(covered.unique()) > 30 and 0.02 < covered.mean() < 0.8
    wide = draw_masks([kind], 24, 40, seeds[:4], torch.zeros(4, 1, 24, 40))
    assert wide.shape == (4, 1, 24, 40)


def test_some_masks_cover_everything_and_some_nothing():
    covered = draw_masks(["boxes"], 16, 16, range(400)).mean((1, 2, 3))
    assert 5 < (covered == 1).sum() < 40 and 0 < (covered == 0).sum() < 15


def test_outpainting_keeps_a_window_or_one_side():
    for mask in draw_masks(["outpaint"], 32, 32, range(40))[:, 0]:
        known = (mask == 0).nonzero()
        if len(known):  # a rectangle is kept
            (top, left), (bottom, right) = known.amin(0), known.amax(0)
            assert len(known) == (bottom - top + 1) * (right - left + 1)


def test_object_masks_cover_an_instance_whole(batch: Batch):
    ids = batch.extras["mask"]
    masks = draw_masks(["objects"], SIDE, SIDE, range(100, 106), ids)
    for mask, instances in zip(masks[:, 0], ids[:, 0], strict=True):
        whole = [bool((mask[instances == k] == 1).all()) for k in instances.unique() if k]
        assert any(whole)
    soft = torch.linspace(0, 1, 100).expand(1, 1, 100, 100)  # soft values instead of ids: the light part is the object
    mask = draw_masks(["objects"], 100, 100, [3], soft)
    assert 0.4 < mask.mean() < 0.7 and mask[..., -1].all()


def test_the_condition_hides_the_masked_pixels(batch: Batch):
    task = get_task("inpaint")
    given = task.given(batch, generator(2))
    hole = (given[:, 3:] == 1).expand(-1, 3, -1, -1)
    changed = torch.cat([torch.where(hole, torch.rand(batch.image.shape), given[:, :3]), given[:, 3:]], 1)
    condition = task.condition(given)
    assert torch.equal(condition, task.condition(changed))
    assert (condition[:, :3][hole] == 0.5).all() and torch.equal(condition[:, :3][~hole], batch.image[~hole])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_may_cover_everything_or_nothing(value: float, batch: Batch):
    task = get_task("inpaint")
    given = task.bring(batch.image, torch.full((1, 1, SIDE, SIDE), value))
    output = torch.rand(batch.image.shape, generator=generator())
    assert torch.equal(task.finish(output, given), output if value else batch.image)
    hole, known = task.obedience(output, given, batch).values()
    assert (known if value else hole).isnan().all() and (hole if value else known).isfinite().all()


def test_known_pixels_are_returned_exactly_but_measured_before_finishing(batch: Batch):
    task = get_task("inpaint")
    mask = torch.zeros(6, 1, SIDE, SIDE)
    mask[..., 20:40] = 0.7  # soft masks are cut at one half
    given = task.bring(batch.image, mask)
    output = (batch.image + 0.1).double()
    finished = task.finish(output, given)
    assert torch.equal(finished[..., :20], batch.image[..., :20].double())
    torch.testing.assert_close(
        finished[..., 20:40], batch.image[..., 20:40].double()
    )  # the shift is the same everywhere
    assert task.obedience(output, given, batch)["known_psnr"].tolist() == pytest.approx([20] * 6, abs=0.01)
    measured = task.obedience(finished, given, batch)
    assert list(measured) == ["hole_psnr", "known_psnr"]  # the first figure is the headline
    assert measured["hole_psnr"].tolist() == pytest.approx([60] * 6, abs=0.01)
    assert measured["known_psnr"].tolist() == [60] * 6
    assert task.obedience(batch.image, given, batch)["hole_psnr"].tolist() == [60] * 6


@pytest.mark.parametrize(
    "mask, message",
    [
        (None, "mask: missing"),
        (torch.ones(2, 1, 8, 8), r"mask of 8 x 8 px: the picture has 16 x 16"),
        (torch.ones(2, 3, 16, 16), "mask of shape"),
        (torch.ones(3, 1, 16, 16), "not a mask for 2 pictures"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message: str):
    with pytest.raises(UserError, match=message):
        get_task("inpaint").bring(torch.zeros(2, 3, 16, 16), mask)


def test_mask_kinds_may_be_one_string():
    assert get_task("inpaint", masks="boxes,objects") == get_task("inpaint", masks=["boxes", "objects"])
    assert get_task("inpaint").columns == () and get_task("inpaint", masks=["objects"]).columns == ("mask",)


# --- depth -----------------------------------------------------------------------------------------------------------


def test_disparity_is_scaled_and_sky_is_farthest():
    distance = torch.tensor([[1.0, 2.0], [4.0, 0.0]])[None, None]
    expected = torch.tensor([[1.0, 1 / 3], [0.0, 0.0]])
    assert torch.allclose(disparity(distance)[0, 0], expected)
    assert torch.allclose(disparity(1000 * distance), disparity(distance))
    odd = torch.tensor([[1.0, 2.0], [4.0, -3.0]])[None, None]
    odd[..., 0, 0] = math.inf
    assert disparity(odd).isfinite().all() and disparity(odd)[0, 0].tolist() == [[0, 1], [0, 0]]


def test_each_map_is_normalized_to_its_own_range():
    maps = torch.stack([torch.linspace(3, 7, 16).view(1, 4, 4), torch.zeros(1, 4, 4), torch.full((1, 4, 4), 9.0)])
    scaled = normalise(maps)
    assert scaled[0].aminmax() == (0, 1) and not scaled[1].any() and (scaled[2] == 1).all()
    maps[0, 0, 0] = math.nan
    assert normalise(maps).isfinite().all()
    assert not disparity(torch.full((1, 1, 4, 4), math.nan)).any()


def test_depth_data_of_8_and_16_bits_is_read(batch: Batch):
    depth = batch.extras["conditioning_image"]
    given = get_task("depth").given(batch, generator())
    assert (given[depth == 0] == 0).all() and (given.amax((1, 2, 3)) == 1).all()
    nearest = depth.masked_fill(depth == 0, math.inf).flatten(1).argmin(1)
    assert (given.flatten(1).gather(1, nearest[:, None]) == 1).all()
    rgb = Batch(batch.image, batch.text, {"conditioning_image": given.mul(0.5).repeat(1, 3, 1, 1)})
    assert torch.allclose(get_task("depth").given(rgb, generator()), given, atol=1e-6)  # 8 bits: near is bright
    dark = get_task("depth", near="dark").given(rgb, generator())
    assert torch.allclose(dark, normalise((-given).where(given > 0, torch.nan)), atol=1e-6)
    assert (dark[given == 0] == 0).all()  # 0 is unknown in maps where dark is near


def test_softened_maps_are_blurred_seeded_and_still_scaled(batch: Batch):
    exact = get_task("depth").given(batch, generator())
    soft = get_task("depth", soften=1.0).given(batch, generator())
    assert torch.equal(soft, get_task("depth", soften=1.0).given(batch, generator()))
    assert soft.shape == exact.shape and (soft.amax((1, 2, 3)) == 1).all() and (soft.amin((1, 2, 3)) == 0).all()
    assert (soft.diff(dim=-1).abs().amax((1, 2, 3)) < exact.diff(dim=-1).abs().amax((1, 2, 3))).all()
    assert (soft - exact).abs().mean() < 0.05
    some = get_task("depth", soften=0.5).given(batch, generator(1))
    assert 0 < sum(torch.equal(a, b) for a, b in zip(some, exact, strict=True)) < 6


def test_depth_jumps_lie_at_outlines_and_must_be_visible(batch: Batch):
    given = torch.zeros(1, 1, SIDE, SIDE)
    given[..., 20:40, 20:40] = 1
    jumps = depth_jumps(given)
    assert jumps.sum() == 4 * 20 * 2 - 4  # both sides of the outline; the inner corners are shared
    picture = given.expand(-1, 3, -1, -1) * 0.8
    task = get_task("depth")

    def shown(output):
        return float(task.obedience(output, given, batch)["jumps_shown"])

    noise = torch.rand(1, 3, SIDE, SIDE, generator=generator())
    assert shown(picture) > 0.8 > 0.6 > shown(picture.roll(9, -1))
    assert shown(torch.zeros_like(picture)) == 0 and abs(shown(noise)) < 0.05  # edges everywhere score nothing
    flat = task.obedience(picture, torch.zeros_like(given), batch)["jumps_shown"]
    assert flat.isnan().all()


# --- canny -----------------------------------------------------------------------------------------------------------


def test_edges_are_detected_where_they_are():
    picture = torch.zeros(2, 3, 32, 32)
    picture[0, :, :, 16:] = 1
    detected = edges(picture, 100, 200)
    assert set(detected.unique().tolist()) == {0, 1} and not detected[1].any()
    assert detected[0, 0, 4:-4].sum(0).nonzero().flatten().tolist() in ([15], [16])


def test_thresholds_change_the_edges(batch: Batch):
    counts = [
        float(get_task("canny", low=low, high=high).given(batch, generator()).mean())
        for low, high in ((0, 0), (50, 100), (100, 200), (255, 255))
    ]
    assert counts == sorted(counts, reverse=True) and counts[1] > counts[3]


def test_jittered_thresholds_give_more_and_fewer_edges(batch: Batch):
    same = Batch(batch.image[:1].expand(20, -1, -1, -1), [""] * 20)
    counts = get_task("canny", jitter=1.0).given(same, generator()).sum((1, 2, 3))
    loose, tight = (get_task("canny", low=100 * f, high=200 * f).given(same, generator()) for f in (0.5, 1.25))
    assert tight.sum((1, 2, 3))[0] >= counts.min() and loose.sum((1, 2, 3))[0] >= counts.max() > counts.min()


def test_canny_accepts_images_and_edge_maps(batch: Batch):
    task = get_task("canny")
    given = task.given(batch, generator())
    assert torch.equal(task.bring(batch.image), given)
    assert torch.equal(task.bring(given * 0.9), given)
    with pytest.warns(UserWarning, match="mostly white"):
        task.bring(1 - given)


def test_edge_f1_forgives_one_pixel_and_no_more():
    line = torch.zeros(1, 1, 16, 16)
    line[..., 8] = 1
    empty = torch.zeros_like(line)
    assert [float(edge_f1(line.roll(shift, -1), line)) for shift in (0, 1, 2)] == [1, 1, 0]
    assert float(edge_f1(empty, empty)) == 1 and float(edge_f1(empty, line)) == float(edge_f1(line, empty)) == 0
    assert float(edge_f1(line + line.roll(4, -1), line)) == pytest.approx(2 / 3)


# --- edit, generate --------------------------------------------------------------------------------------------------


def test_edit_is_measured_inside_and_outside_the_change():
    before, after = torch.full((3, 3, 8, 8), 0.5), torch.full((3, 3, 8, 8), 0.5)
    after[0, :, :4] = 0.9
    after[2] = 0.9  # sample 2 changes everywhere, sample 1 nowhere
    sample = Batch(before, [""] * 3, {"edited_image": after}, instruction=["a", "b", "c"])
    task = get_task("edit")
    unchanged = task.obedience(before, task.given(sample, generator()), sample)
    inside, outside = unchanged["psnr_inside"], unchanged["psnr_outside"]
    assert float(inside[0]) == pytest.approx(-20 * np.log10(0.4), abs=1e-3) and outside[:2].tolist() == [60, 60]
    assert inside[1].isnan() and outside[2].isnan()
    assert list(task.obedience(after, before, sample)) == ["psnr_inside", "psnr_outside"]


def test_generate_takes_only_a_size(batch: Batch):
    task = get_task("generate")
    given = task.bring(torch.zeros(2, 0, 16, 24))
    condition = task.condition(given)
    assert condition.shape == (2, 3, 16, 24) and not condition.any()
    assert task.obedience(batch.image, given, batch) == {}
    with pytest.raises(UserError, match="takes no picture"):
        task.bring(batch.image)


def test_a_membrane_continues_known_values_smoothly() -> None:
    """A linear surface is harmonic, so it is reproduced; no value exceeds its surroundings; nothing known gives 0."""
    known = torch.ones(1, 1, 33, 17)
    known[..., 9:20, 5:12] = 0
    plane = torch.linspace(-1, 1, 17).expand(1, 3, 33, 17)
    filled = membrane(plane, known)
    assert torch.equal(filled[known.expand_as(plane) > 0], plane[known.expand_as(plane) > 0])
    assert (filled - plane).abs().max() < 0.125 and filled.abs().max() <= 1
    assert torch.allclose(membrane(torch.ones(1, 3, 33, 17), known), torch.ones(1, 3, 33, 17), atol=1e-5)
    assert not membrane(plane, torch.zeros_like(known)).any()


def test_inpainting_leaves_no_seam() -> None:
    """An output that is a shade too dark is corrected in the hole; without known pixels it is unchanged."""
    picture, mask = torch.full((1, 3, 16, 16), 0.6), torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 6:12] = 1
    given = torch.cat([picture, mask], 1)
    assert torch.allclose(Inpaint().finish(picture - 0.1, given), picture, atol=1e-5)
    everything = torch.cat([picture, torch.ones_like(mask)], 1)
    assert torch.equal(Inpaint().finish(picture - 0.1, everything), picture - 0.1)
