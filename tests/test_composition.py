"""Two adapters at once on one backbone: weights, order, guidance, low-rank updates, and refused combinations."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codi.errors import UserError
from codi.models.adapter import FORMS, Adapter
from codi.models.adapter_files import load_adapter
from codi.models.backbones.stable_diffusion import unet_down
from codi.models.composition import compose
from codi.models.lora import lora_names
from codi.models.student import Conditioning, Student
from codi.training.saving import save_adapter
from tiny import DOWNSCALE, LATENT_CHANNELS, TEXT_WIDTH, rand, randn, tiny_lora, tiny_unet, tiny_vae

UNET, VAE = tiny_unet().requires_grad_(False), tiny_vae()
WORDS, Z = randn(2, 5, TEXT_WIDTH, seed=7), randn(2, LATENT_CHANNELS, 8, 8)
LEVELS = torch.tensor([3, 800])
with torch.no_grad():
    BACKBONE = UNET(Z, LEVELS, WORDS).sample
# name: (form, condition channels, guidance scales, low-rank updates)
KINDS = {
    "inpaint": ("fused", 4, 1, True),
    "depth": ("fused", 3, 0, False),
    "canny": ("controlnet", 3, 0, True),
    "edit": ("fused", 3, 2, True),
    "generate": ("lora", 3, 1, True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of an adapter with nonzero weights for each of KINDS."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, (form, channels, scales, updates)) in enumerate(KINDS.items()):
        adapter = FORMS[form].from_backbone(UNET, VAE, channels, scales)
        adapter.register_to_config(info={"task": name})
        with torch.no_grad():
            for i, (key, p) in enumerate(adapter.named_parameters()):
                if key.startswith(("mu.", "guidance.")) or "controlnet_" in key:
                    p.copy_(0.3 * rand(*p.shape, seed=100 * number + i))
        unet = tiny_lora(UNET, name, seed=number) if updates else UNET
        save_adapter(root / name, adapter, unet, full=False, half=False)
    return {name: root / name for name in KINDS}


class Parts:
    """The adapters called `names`, loaded from their folders, and a condition for each."""

    def __init__(self, folders: dict[str, Path], *names: str) -> None:
        self.loaded = {name: load_adapter(folders[name], name, None, UNET) for name in names}
        side = 8 * DOWNSCALE
        with torch.no_grad():
            self.conditions = {
                name: adapter.read(rand(2, KINDS[name][1], side, side, seed=len(name)), VAE)
                for name, (adapter, _) in self.loaded.items()
            }

    @property
    def adapters(self) -> dict[str, Adapter]:
        return {name: adapter for name, (adapter, _) in self.loaded.items()}

    @property
    def unets(self) -> dict[str, Any]:
        return {name: unet for name, (_, unet) in self.loaded.items()}

    @torch.no_grad()
    def alone(self, name: str, strength: float = 1.0, guidance: Tensor | None = None) -> Tensor:
        adapter, unet = self.loaded[name]
        student = Student(unet, adapter)
        return student(Z, LEVELS, Conditioning(WORDS, self.conditions[name], guidance=guidance), strength)

    def compose(self, *weights: float) -> Student:
        return compose(UNET, self.adapters, self.unets, dict(zip(self.loaded, weights, strict=True)))

    @functools.cached_property
    def student(self) -> Student:
        return self.compose(*[1.0] * len(self.loaded))

    @torch.no_grad()
    def together(self, *weights: float, guidance: Tensor | None = None, strength: float = 1.0) -> Tensor:
        student: Any = self.student
        student.adapter.weights = dict(zip(self.loaded, weights, strict=True))
        conditioning = Conditioning(WORDS, self.conditions, guidance=guidance)
        output = student(Z, LEVELS, conditioning, strength)
        prepared = student.prepare(conditioning)
        assert torch.equal(student(Z, LEVELS, prepared, strength), output)
        return output


@pytest.fixture(scope="module")
def parts_of(folders) -> Callable[..., Parts]:
    """A cached constructor of Parts by adapter names; tests must not modify them."""
    return functools.cache(functools.partial(Parts, folders))


@pytest.mark.parametrize("name", KINDS)
def test_composition_of_one_adapter_equals_that_adapter(name, parts_of):
    parts = parts_of(name)
    scales = torch.tensor([[3.0, 1.5], [1.0, 2.0]])[:, : max(KINDS[name][2], 1)]
    assert not torch.equal(parts.alone(name), BACKBONE)
    for guidance in (None, scales):
        for weight in (1.0, 0.4):
            assert torch.equal(parts.together(weight, guidance=guidance), parts.alone(name, weight, guidance))
    assert torch.equal(parts.together(1.0, strength=0.4), parts.alone(name, 0.4))


PAIRS = [("depth", "inpaint"), ("inpaint", "edit"), ("canny", "inpaint"), ("generate", "depth")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_weight_0_disables_an_adapter(first, second, parts_of):
    parts = parts_of(first, second)
    text_scale = torch.full((2, 1), 3.0)
    for guidance in (None, text_scale):
        scales = {name: text_scale if KINDS[name][2] < 2 else torch.tensor([[3.0, 1.0]]).expand(2, 2) for name in KINDS}
        for name, weights in ((first, (1, 0)), (second, (0, 1))):
            alone = parts.alone(name, 1.0, None if guidance is None else scales[name])
            assert torch.equal(parts.together(*weights, guidance=guidance), alone)
        assert torch.equal(parts.together(0, 0, guidance=guidance), BACKBONE)
        assert torch.equal(parts.together(1, 1, guidance=guidance, strength=0.0), BACKBONE)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_both_adapters_contribute_by_weight_in_any_order(first, second, parts_of):
    parts, reverse = parts_of(first, second), parts_of(second, first)
    both = parts.together(1, 1)
    torch.testing.assert_close(reverse.together(1, 1), both, rtol=0, atol=1e-5)
    torch.testing.assert_close(reverse.together(0.3, 0.8), parts.together(0.8, 0.3), rtol=0, atol=1e-5)
    apart = {name: float((both - parts.alone(name)).norm()) for name in (first, second)}
    assert min(apart.values()) > 0.01
    nearer = float((parts.together(1, 0.1) - parts.alone(first)).norm())
    assert 0 < nearer < apart[first]


def test_low_rank_updates_of_both_adapters_add_up(folders):
    """With `mu` at 0 no features are fused, so only the updates of the backbone act."""
    parts = Parts(folders, "generate", "inpaint")
    with torch.no_grad():
        for mu in parts.adapters["inpaint"].mu:  # type: ignore[union-attr]
            mu.zero_()
    student = parts.compose(1.0, 0.5)
    assert lora_names(student.network) == ["set_generate", "set_inpaint"] and lora_names(UNET) == []
    assert {id(p) for p in UNET.parameters()} <= {id(p) for p in student.network.parameters()}
    merged = tiny_unet()
    updates = [dict(parts.loaded[name][1].named_parameters()) for name in parts.loaded]
    with torch.no_grad():
        for key, p in merged.named_parameters():
            layer = key.removesuffix(".weight")
            for name, values, weight in zip(parts.loaded, updates, (1.0, 0.5), strict=True):
                if f"{layer}.lora_A.{name}.weight" in values and key.endswith(".weight"):
                    a, b = (values[f"{layer}.lora_{side}.{name}.weight"] for side in "AB")
                    p.add_(weight * torch.einsum("or...,ri...->oi...", b.flatten(1), a.flatten(1)).view_as(p))
        expected = merged(Z, LEVELS, WORDS).sample
    torch.testing.assert_close(parts.together(1.0, 0.5), expected, rtol=0, atol=1e-4)
    assert (expected - BACKBONE).norm() > 0.1


def test_each_adapter_takes_its_guidance_columns(parts_of):
    """Column 0 is text, column 1 image. An adapter with one scale takes column 0; a missing second scale is 1."""
    inpaint, edit = parts_of("inpaint"), parts_of("edit")
    two, text = torch.tensor([[3.0, 1.5]]).expand(2, 2), torch.full((2, 1), 3.0)
    assert torch.equal(inpaint.together(1, guidance=two), inpaint.alone("inpaint", 1, text))
    assert torch.equal(edit.together(1, guidance=text), edit.alone("edit", 1, torch.tensor([[3.0, 1.0]]).expand(2, 2)))
    both = parts_of("inpaint", "edit")
    unguided = both.together(1, 1)
    assert torch.equal(both.together(1, 1, guidance=torch.ones(2, 2)), unguided)
    assert not torch.allclose(both.together(1, 1, guidance=two), unguided)
    assert not torch.allclose(both.together(1, 1, guidance=two), both.together(1, 1, guidance=text))
    assert parts_of("depth").together(1, guidance=two).equal(parts_of("depth").alone("depth"))


def test_guidance_embedding_is_a_weighted_mean(parts_of):
    parts, scale = parts_of("inpaint", "generate"), torch.full((2, 1), 3.0)
    a, b = (adapter.time_condition(scale) for adapter in parts.adapters.values())
    assert a is not None and b is not None

    def embedded(*weights: float) -> Tensor:
        student: Any = parts.compose(*weights)
        return student.adapter.time_condition(scale)

    torch.testing.assert_close(embedded(1, 1), (a + b) / 2)
    torch.testing.assert_close(embedded(3, 1), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(
        embedded(0.2, 0.3), 0.2 * a + 0.3 * b
    )  # weights that sum to less than 1 are not normalized


def test_changed_weights_equal_a_new_composition(parts_of):
    parts = parts_of("depth", "inpaint")  # `together` only sets weights
    conditioning = Conditioning(WORDS, parts.conditions)
    with torch.no_grad():
        for weights in ((1.0, 0.0), (0.2, 0.9), (0.0, 0.0), (1.0, 1.0)):
            assert torch.equal(parts.together(*weights), parts.compose(*weights)(Z, LEVELS, conditioning))


def test_controlnet_runs_once_per_step(parts_of):
    """Its features depend on z_t, not on what other adapters fuse, so they are the same in both orders."""
    parts, calls = parts_of("canny", "inpaint"), []
    canny, inpaint = parts.adapters.values()
    handle = canny.net.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        parts.student.adapter.weights = {"canny": 0.5, "inpaint": 1.0}  # type: ignore[union-attr]
        conditioning = parts.student.prepare(Conditioning(WORDS, parts.conditions))
        parts.student(Z, LEVELS, conditioning)
        assert len(calls) == 1
        handle.remove()

        # The mean of both orders, one adapter at a time.
        features, _ = unet_down(UNET, Z, LEVELS, WORDS)
        features_of_canny = canny.step_features(conditioning.prepared["canny"], Z, LEVELS, WORDS)
        prepared = conditioning.prepared["inpaint"]
        both = {"canny": features_of_canny, "inpaint": prepared}
        for i, h in enumerate(features):
            last = canny.fuse(i, inpaint.fuse(i, h, prepared, 1.0), features_of_canny, 0.5)
            first = inpaint.fuse(i, canny.fuse(i, h, features_of_canny, 0.5), prepared, 1.0)
            fused = parts.student.adapter.fuse(i, h, both, 1.0)  # type: ignore[union-attr]
            torch.testing.assert_close(fused, (last + first) / 2)


def test_a_full_adapter_cannot_be_combined(parts_of):
    adapter, parts = FORMS["fused"].from_backbone(UNET, VAE), parts_of("depth")
    with pytest.raises(UserError, match="^upscale: a full adapter.*train_backbone: false$"):
        compose(
            UNET,
            {**parts.adapters, "upscale": adapter},
            {**parts.unets, "upscale": tiny_unet(seed=5)},
            {"depth": 1.0, "upscale": 1.0},
        )
