"""Backbones, the forms of adapters, the codec and the text encoders."""

import json

import pytest
import torch

from codi.models import codec, text
from codi.models.adapter import FORMS, ControlNetAdapter, FusedAdapter, LoraAdapter
from codi.models.backbones import load_backbone
from codi.models.backbones.stable_diffusion import unet_down, unet_up
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student, cat_conditionings
from tiny import (
    CAPTIONS,
    DOWNSCALE,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    influence,
    rand,
    randn,
    tiny_backbone,
    tiny_unet,
    tiny_xl,
)

BACKBONE = tiny_backbone().freeze()
UNET, VAE = BACKBONE.unet, BACKBONE.vae
WORDS = randn(2, 5, TEXT_WIDTH, seed=7)
LEVELS = torch.tensor([3, 800])
CONDITIONED = [form for form in FORMS if form != "lora"]  # the forms that read a condition

ARCHITECTURES = {
    "cross attention": {},
    "no cross attention": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
    },
    "no middle block": {"mid_block_type": None},
    "three levels, two layers": {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "use_linear_projection": True,
    },
    "layers by level": {"layers_per_block": (1, 2), "only_cross_attention": (False, True)},
    "SDXL's extra conditions": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
        "transformer_layers_per_block": (1, 2),
    },
}


def added_for(changes: dict) -> dict | None:
    if "addition_embed_type" not in changes:
        return None
    return {"text_embeds": randn(2, TEXT_WIDTH, seed=8), "time_ids": 64 * rand(2, 6, seed=9)}


def adapted(form: str, channels: int = 3, unet=UNET) -> tuple[Student, Conditioning]:
    """Return a student before training, and a conditioning for latents of 8 x 8."""
    adapter = FORMS[form].from_backbone(unet, VAE, channels)
    condition = adapter.read(rand(2, channels, 8 * DOWNSCALE, 8 * DOWNSCALE, seed=1), VAE)
    return Student(unet, adapter), Conditioning(WORDS, condition)


# ---- encoder and decoder halves


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_encoder_and_decoder_halves_equal_the_unet(changes):
    unet, added = tiny_unet(seed=1, **changes), added_for(changes)
    for size, timestep in (((8, 8), torch.tensor(17)), ((9, 11), torch.tensor([17])), ((7, 8), LEVELS)):
        z = randn(2, LATENT_CHANNELS, *size)
        whole = unet(z, timestep, WORDS, added_cond_kwargs=added).sample
        assert torch.equal(unet_up(unet, *unet_down(unet, z, timestep, WORDS, added), WORDS), whole)


@torch.no_grad()
def test_a_student_without_adapter_or_condition_is_the_backbone():
    z = randn(2, LATENT_CHANNELS, 8, 8)
    expected = UNET(z, LEVELS, WORDS).sample
    assert torch.equal(Student(UNET)(z, LEVELS, Conditioning(WORDS)), expected)
    for form in FORMS:
        student = influence(adapted(form)[0])
        assert torch.equal(student(z, LEVELS, Conditioning(WORDS)), expected)


# ---- equal to the backbone before training and at strength 0


# diffusers' ControlNet needs a middle block and the same number of layers at every level.
CONTROLLABLE = [name for name in ARCHITECTURES if name not in ("no middle block", "layers by level")]


@pytest.mark.parametrize(
    ("form", "name", "channels"),
    [
        *[("fused", name, 3) for name in ARCHITECTURES],
        *[("controlnet", name, 3) for name in CONTROLLABLE],
        *[("lora", name, 3) for name in ARCHITECTURES],
        *[(form, "cross attention", 5) for form in FORMS],
    ],
)
@torch.no_grad()
def test_before_training_the_student_is_the_backbone(form, name, channels):
    changes = ARCHITECTURES[name]
    unet, added = tiny_unet(seed=2, **changes), added_for(changes)
    student, conditioning = adapted(form, channels, unet)
    conditioning.added = added
    student.network = add_lora(unet, 2, form)
    z = randn(2, LATENT_CHANNELS, 8, 8)
    for timestep in (torch.tensor([17]), LEVELS):
        expected = unet(z, timestep, WORDS, added_cond_kwargs=added).sample
        assert torch.equal(student(z, timestep, conditioning), expected)
        assert torch.equal(student(z, timestep, student.prepare(conditioning)), expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_strength_0_is_the_backbone_after_training_too(form):
    student, conditioning = adapted(form)
    influence(student)
    z = randn(2, LATENT_CHANNELS, 8, 8)
    expected = UNET(z, LEVELS, WORDS).sample
    assert torch.equal(student(z, LEVELS, conditioning, 0.0), expected)
    full = student(z, LEVELS, conditioning)
    assert torch.equal(student(z, LEVELS, conditioning, 1.0), full)
    half = student(z, LEVELS, conditioning, 0.5)
    assert 0 < (half - expected).norm() < (full - expected).norm()


@pytest.mark.parametrize("form", CONDITIONED)
@torch.no_grad()
def test_a_trained_adapter_uses_every_channel_of_its_condition(form):
    student, conditioning = adapted(form, 4)
    adapter = influence(student).adapter
    assert adapter is not None
    if isinstance(adapter, FusedAdapter):  # the weights of the maps start at zero
        adapter.encoder.conv_in.weight[:, LATENT_CHANNELS:] = 0.3
    z, picture = randn(2, LATENT_CHANNELS, 8, 8), rand(2, 4, 32, 32, seed=1)
    before = student(z, LEVELS, conditioning)
    for channel in range(4):
        changed = picture.clone()
        changed[:, channel] = 1 - changed[:, channel]
        assert not torch.equal(student(z, LEVELS, Conditioning(WORDS, adapter.read(changed, VAE))), before)


# ---- the fused form


@torch.no_grad()
def test_features_are_fused_by_the_formula():
    adapter = FusedAdapter.from_backbone(UNET, VAE).double()
    influence(Student(UNET, adapter))
    shapes = [f.shape for f in unet_down(UNET, randn(2, LATENT_CHANNELS, 8, 8), LEVELS, WORDS)[0]]
    h = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    e = [randn(*s, seed=50 + i, dtype=torch.float64) for i, s in enumerate(shapes)]
    for strength in (1.0, 0.3):
        for i, (a, b, mu) in enumerate(zip(h, e, adapter.mu, strict=True)):
            fused = adapter.fuse(i, a, e, strength)
            share = strength * mu.view(1, -1, 1, 1)
            torch.testing.assert_close(fused, (1 - share) * a + share * b, rtol=0, atol=1e-14)


@torch.no_grad()
def test_fused_features_do_not_depend_on_z_or_t():
    student, conditioning = adapted("fused")
    influence(student)
    once = student.prepare(conditioning)
    assert student.prepare(once) is once
    for seed, level in enumerate((0, 500, 999)):
        z, timestep = randn(2, LATENT_CHANNELS, 8, 8, seed=seed), torch.tensor([level])
        assert torch.equal(student(z, timestep, once), student(z, timestep, conditioning))


@torch.no_grad()
def test_the_fused_encoder_starts_as_a_copy_of_the_backbone_s():
    adapter = FusedAdapter.from_backbone(UNET, VAE, 5)
    weights = UNET.state_dict()
    for name, value in adapter.encoder.state_dict().items():
        if name == "conv_in.weight":
            assert torch.equal(value[:, :LATENT_CHANNELS], weights[name]) and not value[:, LATENT_CHANNELS:].any()
        else:
            assert torch.equal(value, weights[name])
    assert not any(mu.any() for mu in adapter.mu)
    assert not any(name.startswith(("encoder.up_blocks", "encoder.conv_out")) for name in adapter.state_dict())


@torch.no_grad()
def test_conditions_are_read_to_the_latent_grid():
    condition = rand(2, 4, 32, 24)
    read = FusedAdapter.from_backbone(UNET, VAE, 4).read(condition, VAE)
    assert read.shape == (2, LATENT_CHANNELS + 1, 8, 6)
    torch.testing.assert_close(read[:, :LATENT_CHANNELS], codec.encode(VAE, condition[:, :3]))
    torch.testing.assert_close(read[:, -1], condition[:, 3].unflatten(1, (8, 4)).unflatten(-1, (6, 4)).mean((2, 4)))
    assert torch.equal(ControlNetAdapter.from_backbone(UNET, VAE, 4).read(condition, VAE), condition)
    assert not LoraAdapter.from_backbone(UNET, VAE, 4).read(condition, VAE).numel()


# ---- gradients


def gradients(student: Student, conditioning: Conditioning) -> dict[str, bool]:
    student.zero_grad()
    student(randn(2, LATENT_CHANNELS, 8, 8), LEVELS, conditioning).square().mean().backward()
    return {k: p.grad is not None and bool(p.grad.any()) for k, p in student.named_parameters() if p.requires_grad}


def test_gradient_of_the_fused_form_reaches_mu_first_then_the_encoder():
    student, conditioning = adapted("fused")
    first = gradients(student, conditioning)
    assert all(has == (".mu." in name) for name, has in first.items()) and sum(first.values()) > 0
    influence(student)
    later = gradients(student, conditioning)
    assert all(later.values()), [name for name, has in later.items() if not has]


def test_gradient_of_the_controlnet_reaches_the_zero_convolutions_first_then_all():
    student, conditioning = adapted("controlnet")
    first = gradients(student, conditioning)
    assert {name for name, has in first.items() if has} == {
        name for name in first if "controlnet_down_blocks" in name or "controlnet_mid_block" in name
    }
    influence(student)
    later = gradients(student, conditioning)
    assert all(later.values()), [name for name, has in later.items() if not has]


@pytest.mark.parametrize("form", CONDITIONED)
def test_in_full_mode_gradient_reaches_the_backbone(form):
    student, conditioning = adapted(form, unet=tiny_unet(seed=3))
    reached = gradients(student, conditioning)
    assert all(has for name, has in reached.items() if name.startswith("network."))
    student.network.requires_grad_(False)
    assert not any(name.startswith("network.") for name in gradients(student, conditioning))


# ---- codec, text, conditioning


@torch.no_grad()
def test_the_codec_is_the_vae_with_its_scaling():
    image = rand(2, 3, 32, 24)
    assert codec.downscale(VAE) == DOWNSCALE
    posterior = VAE.encode(image * 2 - 1).latent_dist  # type: ignore[union-attr]
    torch.testing.assert_close(codec.encode(VAE, image), posterior.mean * VAE.config["scaling_factor"])
    sample = codec.encode(VAE, image, torch.Generator().manual_seed(3))
    assert torch.equal(sample, codec.encode(VAE, image, torch.Generator().manual_seed(3)))
    noise = (sample / VAE.config["scaling_factor"] - posterior.mean) / posterior.std
    torch.testing.assert_close(noise, randn(*noise.shape, seed=3), rtol=0, atol=1e-4)
    decoded = VAE.decode(posterior.mean).sample / 2 + 0.5  # type: ignore[union-attr]
    latent = codec.encode(VAE, image)
    torch.testing.assert_close(codec.decode(VAE, latent, clamp=False), decoded, rtol=0, atol=1e-5)
    assert codec.decode(VAE, 50 * latent).min() >= 0 and codec.decode(VAE, 50 * latent).max() <= 1


def test_prompts_are_encoded_to_features():
    tokenizer = BACKBONE.tokenizer
    tokens = text.tokenize(tokenizer, [*CAPTIONS, "", "ball " * 100])
    assert tokens.shape == (4, tokenizer.model_max_length)
    features, added = text.embed_prompts(BACKBONE.text, [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert added is None
    assert features.shape == (3, tokenizer.model_max_length, TEXT_WIDTH) and not features.requires_grad
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
    alone, _ = text.embed_prompts(BACKBONE.text, [CAPTIONS[1]])
    torch.testing.assert_close(alone, features[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_backbone, tiny_xl])
@pytest.mark.parametrize("missing", ["model_max_length", "tokenizer_config.json"])
def test_a_tokenizer_without_a_limit_reads_as_many_tokens_as_its_text_encoder(tmp_path, make, missing):
    backbone = make().freeze()
    backbone.pipeline().save_pretrained(tmp_path)
    for file in tmp_path.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        del config["model_max_length"]
        file.write_text(json.dumps(config)) if missing == "model_max_length" else file.unlink()
    loaded = load_backbone(tmp_path).freeze()
    expected = backbone.text.encode(CAPTIONS[:2])
    for key, value in loaded.text.encode(CAPTIONS[:2]).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match=f"the text encoder reads {backbone.tokenizer.model_max_length}"):
        loaded.text.encode(["ball " * 200])


@pytest.mark.parametrize("prompt", ["ball " * 1000, "b" * 5000, "ball\n" * 1000])
def test_the_cut_part_of_a_long_prompt_is_abbreviated_in_the_warning(prompt):
    with pytest.warns(UserWarning, match="this is cut: '.* \\.\\.\\. .*'$") as caught:
        BACKBONE.text.encode([prompt])
    assert len(caught) == 1 and len(str(caught[0].message)) < 300


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_two_conditionings_can_share_a_batch(form):
    student, conditioning = adapted(form)
    influence(student)
    other = Conditioning(randn(2, 5, TEXT_WIDTH, seed=11), conditioning.condition)
    z = randn(2, LATENT_CHANNELS, 8, 8)
    for prepare in (lambda c: c, student.prepare):
        output = student(torch.cat([z, z]), torch.tensor([9]), cat_conditionings(prepare(other), prepare(conditioning)))
        for half, single in zip(output.chunk(2), (other, conditioning), strict=True):
            torch.testing.assert_close(half, student(z, torch.tensor([9]), single), rtol=0, atol=1e-5)
