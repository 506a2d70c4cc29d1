"""The procedural world: captions and edits are exact, images and depths follow the camera's closed form."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from codi.data.raycast import FAR, FIELD_OF_VIEW, LOOK_AT, render
from codi.data.scenes import (
    COLOURS,
    EDITS,
    FLOORS,
    SHAPES,
    SPLITS,
    TIMES,
    UNSEEN_PAIRS,
    Scene,
    Solid,
    sample_edit,
    sample_scene,
)

HEIGHT = 2.0
EMPTY = Scene((), "gray", "plain", "noon", 0.4, 0.8, HEIGHT, 0.5)


def scenes(split="train", count=200, seed=0):
    return [sample_scene(seed, split, i) for i in range(count)]


def pixels(scene, size=64, supersample=2):
    out = render([scene], size, supersample)
    return out.image[0].int(), out.depth[0], out.mask[0].int()


def rays(size):
    """Return directions (size, size, 3) through pixel centers, with optical-axis component 1, in float64."""
    pitch = math.atan2(HEIGHT - LOOK_AT[1], LOOK_AT[2])
    across = ((np.arange(size) + 0.5) / size * 2 - 1) * math.tan(FIELD_OF_VIEW / 2)
    right = np.array((1.0, 0.0, 0.0))
    up = np.array((0.0, math.cos(pitch), math.sin(pitch)))
    forward = np.array((0.0, -math.sin(pitch), math.cos(pitch)))
    return across[None, :, None] * right - across[:, None, None] * up + forward, forward


def project(point, size):
    """Return the row and column, as floats, of a world point."""
    _, forward = rays(2)
    up = np.array((0.0, forward[2], -forward[1]))
    v = np.asarray(point) - (0.0, HEIGHT, 0.0)
    scale = size / 2 / math.tan(FIELD_OF_VIEW / 2) / (v @ forward)
    return size / 2 - 0.5 - (v @ up) * scale, size / 2 - 0.5 + v[0] * scale


def with_solid(shape, **change):
    return replace(EMPTY, solids=(replace(Solid(shape, "red", "matte", "large", 0.0, 5.5, 0.0), **change),))


def dilated(mask):
    """Return a boolean mask with its neighboring pixels, which mix both sides of an edge."""
    return torch.nn.functional.max_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0] > 0


def test_a_scene_is_the_same_in_any_batch():
    group = [sample_scene(3, "train", i) for i in range(8)]
    assert group[5] == sample_scene(3, "train", 5)
    together = render(group, 48)
    for i, scene in enumerate(group):
        alone = render([scene], 48)
        for field in ("image", "depth", "mask"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i])
    assert sample_edit(group[5], 3, "train", 5) == sample_edit(group[5], 3, "train", 5)


def test_splits_and_seeds_share_no_scene():
    drawn = [s for split in SPLITS for seed in (0, 1) for s in scenes(split, 300, seed)]
    assert len(set(drawn)) == len(drawn)


def test_unseen_pairs_are_in_every_composition_scene_and_no_other():
    def pairs(scene):
        return {(s.colour, s.shape) for s in scene.solids} & set(UNSEEN_PAIRS)

    assert not any(pairs(s) for split in ("train", "held-out") for s in scenes(split, 500))
    composition = scenes("composition", 500)
    assert all(pairs(s) for s in composition)
    assert set.union(*(pairs(s) for s in composition)) == set(UNSEEN_PAIRS)


def test_no_edit_makes_an_unseen_pair():
    for i, scene in enumerate(scenes(count=200)):
        for kind in ("recolour", "shape"):
            target = sample_edit(scene, 0, "train", i, kind).target
            assert not {(s.colour, s.shape) for s in target.solids} & set(UNSEEN_PAIRS)


@pytest.mark.parametrize("count", (1, 2, 3, 4))
def test_the_number_of_solids_can_be_set(count):
    assert all(len(sample_scene(0, "train", i, count).solids) == count for i in range(400))


def test_captions_describe_the_scene_exactly():
    for scene in scenes():
        solids, place = scene.caption.split(" on a ")
        phrases = re.split(r", | and ", solids)
        assert phrases == [f"a {s.size} {s.material} {s.colour} {s.shape}" for s in scene.solids]
        assert place == f"{scene.floor} {scene.pattern} floor at {scene.time}"
        assert list(scene.solids) == sorted(scene.solids, key=lambda s: s.x)


def test_solids_never_intersect():
    reach = {"sphere": 1.0, "cylinder": 1.0, "cone": 1.0, "box": 0.85 * math.sqrt(2)}
    for scene in scenes(count=1000):
        for i, a in enumerate(scene.solids):
            for b in scene.solids[i + 1 :]:
                touching = reach[a.shape] * a.radius + reach[b.shape] * b.radius
                assert math.hypot(a.x - b.x, a.z - b.z) > touching


@pytest.mark.parametrize("split", SPLITS)
def test_every_solid_of_a_caption_is_visible(split):
    for at in range(0, 200, 4):
        group = [sample_scene(0, split, i) for i in range(at, at + 4)]
        mask = render(group, 64).mask
        for scene, ids in zip(group, mask, strict=True):
            counts = torch.bincount(ids.flatten().int(), minlength=5)
            assert (counts[1 : len(scene.solids) + 1] >= 8).all()
            assert (counts[len(scene.solids) + 1 :] == 0).all()


def test_floor_depth_is_exact_everywhere_and_sky_is_zero():
    _, depth, mask = pixels(EMPTY, 96, 1)
    directions, _ = rays(96)
    down = -directions[..., 1]
    sky = down <= 1e-6
    assert sky.any() and not sky.all()
    expected = np.where(sky, 0.0, np.minimum(HEIGHT / np.where(sky, 1.0, down), FAR))
    np.testing.assert_allclose(depth.numpy(), expected, rtol=2e-4)
    assert not mask.any()


def test_sphere_depth_at_its_center_is_exact():
    scene = with_solid("sphere", x=0.4)
    solid = scene.solids[0]
    _, depth, mask = pixels(scene, 512, 1)
    centre = np.array((solid.x, solid.radius, solid.z))
    _, forward = rays(2)
    from_camera = centre - (0.0, HEIGHT, 0.0)
    distance = np.linalg.norm(from_camera)
    row, column = (round(float(v)) for v in project(centre, 512))
    assert mask[row, column] == 1
    assert depth[row, column] == pytest.approx((from_camera @ forward) * (1 - solid.radius / distance), abs=2e-3)


def test_silhouette_of_a_sphere_is_the_tangent_cone():
    scene = with_solid("sphere")
    _, _, mask = pixels(scene, 256, 1)
    directions, _ = rays(256)
    centre = np.array((0.0, scene.solids[0].radius, 5.5)) - (0.0, HEIGHT, 0.0)
    along = directions @ centre / np.linalg.norm(directions, axis=-1)
    expected = centre @ centre - along**2 < scene.solids[0].radius ** 2
    assert (mask.bool().numpy() != expected).sum() <= 2  # single precision at the rim


def test_depths_of_box_cylinder_and_cone_are_exact():
    directions, _ = rays(512)
    middle = directions[:, 256]
    radius, z = 0.72, 5.5
    for shape in ("box", "cylinder", "cone"):
        _, depth, mask = pixels(with_solid(shape), 512, 1)
        # The plane x = 0 cuts a front line: z = z0 - half, z0 - r, or the cone's z0 - r (1 - y / 2r).
        if shape == "cone":
            t = (z - radius + HEIGHT / 2) / (middle[:, 2] - middle[:, 1] / 2)
        else:
            t = (z - radius * (0.85 if shape == "box" else 1.0)) / middle[:, 2]
        y = HEIGHT + t * middle[:, 1]
        top = radius * {"box": 1.6, "cylinder": 1.7, "cone": 2.0}[shape]
        side = (y > 0.01) & (y < top - 0.05)
        assert side.sum() > 50 and mask[side, 256].bool().all()
        np.testing.assert_allclose(depth[side, 256].numpy(), t[side], atol=1e-3)
        if shape != "cone":  # the top face, visible from above: the plane y = top
            lid = (HEIGHT - top) / -middle[:, 1]
            visible = (y > top + 0.01) & (top < HEIGHT) & (lid > 0) & (np.abs(lid * middle[:, 2] - z) < radius * 0.8)
            assert visible.sum() >= 5
            np.testing.assert_allclose(depth[visible, 256].numpy(), lid[visible], atol=1e-3)


def test_a_turned_box_shows_its_edge_nearer():
    flat, turned = (pixels(with_solid("box", yaw=yaw), 256, 1)[1] for yaw in (0.0, math.pi / 4))
    row, column = (round(float(v)) for v in project((0.0, 0.5, 5.5), 256))
    half = 0.85 * 0.72
    directions, _ = rays(256)
    ray = directions[row, column]
    assert flat[row, column] == pytest.approx((5.5 - half) / ray[2], abs=1e-3)
    assert turned[row, column] == pytest.approx((5.5 - half * math.sqrt(2)) / ray[2], abs=0.02)


def test_mask_ids_follow_the_caption_and_nearer_solids_occlude():
    left, right = (replace(with_solid("sphere").solids[0], x=x, size="small") for x in (-1.0, 1.0))
    _, _, mask = pixels(replace(EMPTY, solids=(left, right)), 64)
    assert set(mask[:, :32].unique().tolist()) == {0, 1}
    assert set(mask[:, 32:].unique().tolist()) == {0, 2}
    near = replace(with_solid("sphere").solids[0], size="small", z=4.8)
    far = replace(with_solid("cone").solids[0], z=7.0)
    _, depth, mask = pixels(replace(EMPTY, solids=(far, near)), 64)
    alone = pixels(replace(EMPTY, solids=(near,)), 64)
    assert torch.equal(mask == 2, alone[2] == 1)
    assert torch.equal(depth[mask == 2], alone[1][alone[2] == 1])


def test_the_shadow_lies_away_from_the_sun():
    for azimuth in (-1.1, 1.1):
        scene = replace(with_solid("sphere"), sun_azimuth=azimuth)
        radius = scene.solids[0].radius
        sun = np.array(
            (
                math.sin(azimuth) * math.cos(scene.sun_elevation),
                math.sin(scene.sun_elevation),
                -math.cos(azimuth) * math.cos(scene.sun_elevation),
            )
        )
        middle = np.array((0.0, radius, 5.5)) - sun * radius / sun[1]
        row, column = (round(float(v)) for v in project(middle, 128))
        bare, shadowed = pixels(replace(scene, solids=()), 128)[0], pixels(scene, 128)
        assert shadowed[2][row, column] == 0
        assert (shadowed[0][:, row, column] < bare[:, row, column] - 30).all()


@pytest.mark.parametrize("colour", COLOURS)
def test_every_color_is_distinct_when_rendered(colour):
    reference = {c: pixels(with_solid("sphere", colour=c), 32) for c in COLOURS}
    image, _, mask = pixels(with_solid("box", colour=colour), 32)
    mean = image[:, mask == 1].float().mean(1)
    distances = {c: (i[:, m == 1].float().mean(1) - mean).norm().item() for c, (i, _, m) in reference.items()}
    assert min(distances, key=lambda c: distances[c]) == colour


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_only_what_its_instruction_says(kind):
    for i in range(40):
        before = sample_scene(1, "train", i)
        edit = sample_edit(before, 1, "train", i, kind)
        after, instruction = edit.target, edit.instruction
        assert edit.kind == kind and after != before
        if kind in ("floor", "time"):
            if kind == "floor":
                assert replace(after, floor=before.floor, pattern=before.pattern) == before
                assert instruction == f"change the floor to {after.floor} {after.pattern}"
            else:
                assert replace(after, time=before.time) == before
                assert instruction == f"make it {after.time}"
            continue
        assert replace(after, solids=before.solids) == before
        if kind == "remove":
            removed = [s for s in before.solids if s not in after.solids]
            assert len(removed) == 1 and len(after.solids) == len(before.solids) - 1
            assert instruction.startswith("remove the ") and instruction.endswith(removed[0].shape)
            continue
        changed = [(a, b) for a, b in zip(before.solids, after.solids, strict=True) if a != b]
        assert len(changed) == 1
        a, b = changed[0]
        if kind == "recolour":
            assert replace(b, colour=a.colour) == a and instruction.endswith(f"{a.shape} {b.colour}")
        elif kind == "material":
            assert replace(b, material=a.material) == a and instruction.endswith(f"{a.shape} {b.material}")
        else:
            assert replace(b, shape=a.shape) == a and instruction.endswith(f"{a.shape} into a {b.shape}")


def test_instructions_identify_one_solid():
    for i, scene in enumerate(scenes(count=300)):
        edit = sample_edit(scene, 0, "train", i, "remove")
        words = edit.instruction.removeprefix("remove the ").split()
        gone = next(s for s in scene.solids if s not in edit.target.solids)
        ordinal = {"first": 0, "second": 1, "third": 2, "fourth": 3}.get(words[0])
        described = words if ordinal is None else words[1:]
        fitting = [s for s in scene.solids if all(w in s.phrase.split() for w in described)]
        assert fitting[ordinal or 0] == gone and (ordinal is not None or len(fitting) == 1)


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_only_its_pixels(kind):
    for i in range(12):
        before = sample_scene(2, "train", i)
        after = sample_edit(before, 2, "train", i, kind).target
        (image_a, depth_a, mask_a), (image_b, depth_b, mask_b) = pixels(before), pixels(after)
        differs = (image_a != image_b).any(0)
        assert differs.any()
        if kind in ("recolour", "material", "floor", "time"):
            assert torch.equal(depth_a, depth_b) and torch.equal(mask_a, mask_b)
        if kind in ("recolour", "material"):
            which = next(k for k, s in enumerate(before.solids) if s != after.solids[k]) + 1
            assert not differs[~dilated(mask_a == which)].any()
        if kind == "floor":
            inside = ~dilated(mask_a == 0)
            assert not differs[inside].any()
        if kind == "shape":
            which = next(k for k, s in enumerate(before.solids) if s != after.solids[k]) + 1
            elsewhere = ~((mask_a == which) | (mask_b == which))
            assert torch.equal(depth_a[elsewhere], depth_b[elsewhere])
        if kind == "remove":
            which = next(k for k, s in enumerate(before.solids) if s not in after.solids) + 1
            assert torch.equal(depth_a[mask_a != which], depth_b[mask_a != which])
            assert mask_b.max() <= len(after.solids)


def test_supersampling_smooths_edges_but_keeps_depths_and_ids():
    for i in range(6):
        scene = sample_scene(4, "train", i)
        (image_1, depth_1, mask_1), (image_3, depth_3, mask_3) = pixels(scene, 64, 1), pixels(scene, 64, 3)
        edge = dilated(mask_1 != 0) & dilated(mask_1 == 0)
        for k in range(1, len(scene.solids) + 1):
            edge |= dilated(mask_1 == k) & dilated(mask_1 != k)
        # An odd factor has one sample at the pixel's center, the same one.
        assert torch.equal(mask_1[~edge], mask_3[~edge]) and (mask_1 != mask_3).float().mean() < 1e-3
        torch.testing.assert_close(depth_1[mask_1 == mask_3], depth_3[mask_1 == mask_3], rtol=1e-4, atol=2e-3)
        assert (image_1 != image_3).any()
        mask_2 = pixels(scene, 64, 2)[2]
        assert torch.equal(mask_1[~edge], mask_2[~edge])


@pytest.mark.parametrize("size", (32, 33, 100, 512))
def test_valid_sizes_are_rendered(size):
    out = render([EMPTY], size, 1)
    assert out.image.shape == (1, 3, size, size) and out.image.dtype == torch.uint8
    assert out.depth.shape == out.mask.shape == (1, size, size)


@pytest.mark.parametrize("size", (0, 31, 513))
def test_invalid_sizes_are_refused(size):
    with pytest.raises(ValueError, match="32..512"):
        render([EMPTY], size)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="held-out"):
        sample_scene(0, "test", 0)
    with pytest.raises(ValueError, match="recolour"):
        sample_edit(with_solid("box"), 0, "train", 0, "paint")


def test_every_word_of_the_vocabulary_occurs():
    drawn = scenes(count=300)
    solids = [s for scene in drawn for s in scene.solids]
    assert {s.shape for s in solids} == set(SHAPES) and {s.colour for s in solids} == set(COLOURS)
    assert {s.floor for s in drawn} == set(FLOORS) and {s.time for s in drawn} == set(TIMES)
    assert {sample_edit(s, 0, "train", i).kind for i, s in enumerate(drawn)} == set(EDITS)
