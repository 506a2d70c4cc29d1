"""The backbone's seam, the forms of adapters, and what happens to broken files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codi.errors import UserError
from codi.models import codec, text
from codi.models.adapter import FORMS, ControlNetAdapter, FusedAdapter, HintAdapter, LoraAdapter
from codi.models.adapter_files import load_adapter
from codi.models.backbone import load_backbone, unet_down, unet_up
from codi.models.lora import FILE, add_lora
from codi.models.student import Conditioning, Student, cat_conditionings
from codi.training.saving import save_adapter
from tiny import (
    CAPTIONS,
    DOWNSCALE,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    rand,
    randn,
    tiny_backbone,
    tiny_checkpoint,
    tiny_lora,
    tiny_unet,
)

BACKBONE = tiny_backbone().freeze()
UNET, VAE = BACKBONE.unet, BACKBONE.vae
WORDS = randn(2, 5, TEXT_WIDTH, seed=7)
LEVELS = torch.tensor([3, 800])
CONDITIONED = [form for form in FORMS if form != "lora"]  # the forms that look at a condition

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
    """A student before training, and a conditioning for latents of 8 x 8."""
    adapter = FORMS[form].from_backbone(unet, VAE, channels)
    condition = adapter.read(rand(2, channels, 8 * DOWNSCALE, 8 * DOWNSCALE, seed=1), VAE)
    return Student(unet, adapter), Conditioning(WORDS, condition)


def influence(student: Student, seed: int = 5) -> Student:
    """What training does: gives the adapter a say. The form without a condition has it through low-rank updates."""
    adapter = student.adapter
    with torch.no_grad():
        if isinstance(adapter, FusedAdapter):
            for i, mu in enumerate(adapter.mu):
                mu.copy_(rand(*mu.shape, seed=seed + i))
        elif isinstance(adapter, ControlNetAdapter):
            for i, p in enumerate(q for name, q in adapter.named_parameters() if "controlnet_" in name):
                p.copy_(0.2 * randn(*p.shape, seed=seed + i))
        elif isinstance(adapter, HintAdapter):
            for i, p in enumerate(adapter.entry[2].parameters()):
                p.copy_(randn(*p.shape, seed=seed + i))
        else:
            student.unet = tiny_lora(student.unet, seed=seed)
    return student


# ---- the seam


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_both_halves_make_the_unet(changes):
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


# ---- before training, and switched off: the backbone


# diffusers' ControlNet wants a middle block and the same number of layers at every level.
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
    student.unet = add_lora(unet, 2, form)
    z = randn(2, LATENT_CHANNELS, 8, 8)
    for timestep in (torch.tensor([17]), LEVELS):
        expected = unet(z, timestep, WORDS, added_cond_kwargs=added).sample
        assert torch.equal(student(z, timestep, conditioning), expected)
        assert torch.equal(student(z, timestep, student.prepare(conditioning)), expected)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_strength_0_is_the_backbone_whatever_was_learnt(form):
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
def test_a_trained_adapter_sees_its_condition_and_every_channel_of_it(form):
    student, conditioning = adapted(form, 4)
    adapter = influence(student).adapter
    assert adapter is not None
    if isinstance(adapter, FusedAdapter):  # the maps' weights start at zero
        adapter.encoder.conv_in.weight[:, LATENT_CHANNELS:] = 0.3
    z, picture = randn(2, LATENT_CHANNELS, 8, 8), rand(2, 4, 32, 32, seed=1)
    before = student(z, LEVELS, conditioning)
    for channel in range(4):
        changed = picture.clone()
        changed[:, channel] = 1 - changed[:, channel]
        assert not torch.equal(student(z, LEVELS, Conditioning(WORDS, adapter.read(changed, VAE))), before)


# ---- the fused form


@torch.no_grad()
def test_fusion_formula():
    adapter = FusedAdapter.from_backbone(UNET, VAE).double()
    influence(Student(UNET, adapter))
    shapes = [f.shape for f in unet_down(UNET, randn(2, LATENT_CHANNELS, 8, 8), LEVELS, WORDS)[0]]
    h = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    e = [randn(*s, seed=50 + i, dtype=torch.float64) for i, s in enumerate(shapes)]
    for strength in (1.0, 0.3):
        for fused, a, b, mu in zip(adapter.fuse(h, e, strength), h, e, adapter.mu, strict=True):
            share = strength * mu.view(1, -1, 1, 1)
            torch.testing.assert_close(fused, (1 - share) * a + share * b, rtol=0, atol=1e-14)


@torch.no_grad()
def test_fused_features_know_neither_z_nor_t():
    student, conditioning = adapted("fused")
    influence(student)
    once = student.prepare(conditioning)
    assert student.prepare(once) is once
    for seed, level in enumerate((0, 500, 999)):
        z, timestep = randn(2, LATENT_CHANNELS, 8, 8, seed=seed), torch.tensor([level])
        assert torch.equal(student(z, timestep, once), student(z, timestep, conditioning))


@torch.no_grad()
def test_the_fused_encoder_starts_as_the_backbone_s():
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
def test_reading_a_condition():
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
    assert all(has for name, has in reached.items() if name.startswith("unet."))
    student.unet.requires_grad_(False)
    assert not any(name.startswith("unet.") for name in gradients(student, conditioning))


# ---- files


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_an_adapter_s_round_trip_through_its_folder(form, channels, tmp_path):
    info = {"task": "upscale", "family": BACKBONE.family, "steps": 4, "metrics": {"psnr": 30.5}}
    student = influence(Student(UNET, FORMS[form].from_backbone(UNET, VAE, channels)))
    adapter: Any = student.adapter
    adapter.register_to_config(info=info)
    save_adapter(tmp_path / "adapter", adapter, student.unet, full=False, half=False)
    assert json.loads((tmp_path / "adapter/config.json").read_text())["info"] == info
    assert not list(tmp_path.rglob("*.bin"))
    loaded, unet = load_adapter(tmp_path / "adapter", "upscale", BACKBONE.family, UNET)
    assert type(loaded) is type(adapter) and dict(loaded.config["info"]) == info
    assert (unet is UNET) == (form != "lora")
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), adapter.state_dict().values(), strict=True)
    )
    z = randn(2, LATENT_CHANNELS, 8, 8)
    conditioning = Conditioning(WORDS, adapter.read(rand(2, channels, 32, 32), VAE))
    assert torch.equal(Student(unet, loaded)(z, LEVELS, conditioning), student(z, LEVELS, conditioning))


@torch.no_grad()
def test_a_full_adapter_brings_its_own_unet(tmp_path):
    FusedAdapter.from_backbone(UNET, VAE).save_pretrained(tmp_path)
    trained = tiny_unet(seed=9)
    trained.save_pretrained(tmp_path / "unet")
    _, unet = load_adapter(tmp_path, None, None, UNET)
    assert unet is not UNET
    assert all(
        torch.equal(a, b) for a, b in zip(unet.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def refused(attempt, *parts: str) -> str:
    """The message of the UserError that `attempt` must end in: one line that contains `parts`."""
    with pytest.raises(UserError) as error:
        attempt()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message
    return message


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapter = FusedAdapter.from_backbone(UNET, VAE)
    adapter.register_to_config(info={"task": "upscale", "family": BACKBONE.family})
    save_adapter(folder, adapter, tiny_lora(UNET, "upscale"), full=False, half=False)
    return folder


def edit(weights: Path, change) -> None:
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


def broken(folder: Path, to: Path, name: str, change) -> Path:
    """A copy of `folder` whose file `name` went through `change(path)`."""
    shutil.copytree(folder, to)
    change(to / name)
    return to


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan(path: Path) -> None:
    edit(path, lambda tensors: tensors[sorted(tensors)[0]].view(-1)[:1].fill_(float("nan")))


def drop(path: Path) -> None:
    edit(path, lambda tensors: tensors.pop(sorted(tensors)[0]))


def pickled(path: Path) -> None:
    tensors = load_file(path)
    path.unlink()
    name = "pytorch_model.bin" if path.name == "model.safetensors" else path.with_suffix(".bin").name
    torch.save(tensors, path.with_name(name))


def test_adapters_of_others_are_refused(adapter_folder):
    other = "4ch-f8-320/640/1280/1280x2-text768-epsilon"
    refused(lambda: load_adapter(adapter_folder, None, other, UNET), str(adapter_folder), BACKBONE.family, other)
    refused(lambda: load_adapter(adapter_folder, "inpaint", None, UNET), str(adapter_folder), "'upscale'", "'inpaint'")
    load_adapter(adapter_folder, None, None, UNET)


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_missing_adapter_is_refused(missing, tmp_path):
    refused(lambda: load_adapter(tmp_path / missing, "upscale", None, UNET), str(tmp_path), "no adapter there")


@pytest.mark.parametrize(
    ("change", "said"),
    [(nan, "NaN"), (truncate, "could not be read"), (drop, "is missing"), (pickled, "could not be read")],
)
def test_broken_adapter_weights_are_refused(change, said, adapter_folder, tmp_path):
    bad = broken(adapter_folder, tmp_path / "bad", "diffusion_pytorch_model.safetensors", change)
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad), said)


@pytest.mark.parametrize(("change", "said"), [(nan, "NaN"), (truncate, "could not be read")])
def test_broken_low_rank_updates_are_refused(change, said, adapter_folder, tmp_path):
    bad = broken(adapter_folder, tmp_path / "bad", FILE, change)
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad / FILE), said)


@pytest.mark.parametrize(
    "config",
    ["", "not json", "[]", "{}", '{"_class_name": "UNet2DConditionModel"}', '{"_class_name": "FusedAdapter"}',
     '{"_class_name": "FusedAdapter", "info": "x"}', '{"_class_name": "FusedAdapter", "unet": {}}'],
)  # fmt: skip
def test_other_configs_are_not_adapters(config, adapter_folder, tmp_path):
    bad = broken(adapter_folder, tmp_path / "bad", "config.json", lambda path: path.write_text(config))
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad))


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_a_backbone_loads_from_a_stable_diffusion_folder(prediction, tmp_path):
    loaded = load_backbone(tiny_checkpoint(tmp_path, prediction))
    assert loaded.schedule.prediction == prediction and loaded.schedule.horizon == 1000
    assert loaded.family == f"4ch-f4-8/16x1-text8-{prediction}"
    for part in ("vae", "unet", "text_encoder"):
        ours, theirs = getattr(loaded, part), getattr(BACKBONE, part)
        assert not ours.training
        theirs = dict(theirs.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())
    words = text.embed_prompts(loaded.tokenizer, loaded.text_encoder, CAPTIONS)
    assert torch.equal(words, text.embed_prompts(BACKBONE.tokenizer, BACKBONE.text_encoder, CAPTIONS))
    frozen = loaded.freeze().to("cpu", torch.float64)
    assert frozen.unet.dtype == torch.float64 and not any(p.requires_grad for p in frozen.unet.parameters())


def test_folders_that_are_no_backbone_are_refused(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", "no-such-model"):
        refused(lambda name=name: load_backbone(name), str(name), "no model there")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(("change", "said"), [(nan, "NaN"), (truncate, "loaded"), (pickled, "loaded")])
def test_broken_backbone_weights_are_refused(part, change, said, checkpoint_folder, tmp_path):
    weights = next((checkpoint_folder / part).glob("*.safetensors")).relative_to(checkpoint_folder)
    bad = broken(checkpoint_folder, tmp_path / "bad", str(weights), change)
    refused(lambda: load_backbone(bad), str(bad), said)


def test_a_backbone_s_missing_weight_is_named(checkpoint_folder, tmp_path):
    bad = broken(checkpoint_folder, tmp_path / "bad", "unet/diffusion_pytorch_model.safetensors", drop)
    refused(lambda: load_backbone(bad), str(bad), "is missing")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.safetensors"])
def test_single_files_that_are_not_safetensors_are_refused(name, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / name)
    refused(lambda: load_backbone(tmp_path / name), name)


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


def test_prompts_become_features():
    tokenizer, encoder = BACKBONE.tokenizer, BACKBONE.text_encoder
    tokens = text.tokenize(tokenizer, [*CAPTIONS, "", "ball " * 100])
    assert tokens.shape == (4, tokenizer.model_max_length)
    features = text.embed_prompts(tokenizer, encoder, [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert features.shape == (3, tokenizer.model_max_length, TEXT_WIDTH) and not features.requires_grad
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
    alone = text.embed_prompts(tokenizer, encoder, [CAPTIONS[1]])
    torch.testing.assert_close(alone, features[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_two_conditionings_in_one_batch(form):
    student, conditioning = adapted(form)
    influence(student)
    other = Conditioning(randn(2, 5, TEXT_WIDTH, seed=11), conditioning.condition)
    z = randn(2, LATENT_CHANNELS, 8, 8)
    for prepare in (lambda c: c, student.prepare):
        both = student(torch.cat([z, z]), torch.tensor([9]), cat_conditionings(prepare(other), prepare(conditioning)))
        for half, single in zip(both.chunk(2), (other, conditioning), strict=True):
            torch.testing.assert_close(half, student(z, torch.tensor([9]), single), rtol=0, atol=1e-5)
