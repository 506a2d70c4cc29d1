"""Pretraining in the FLUX.1 layout: it trains, resumes bit for bit, and diffusers opens the folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

from codi.data.sources import open_source
from codi.errors import UserError
from codi.training.adversarial import adversarial_losses, new_discriminator
from codi.training.codec import CodecJob, new_vae
from codi.training.flux import flow_times
from codi.training.muon import Muon, muon_groups, orthogonalized
from codi.training.pretrain import pretrain
from codi.training.pretrain_recipe import PretrainRecipe
from codi.training.scene_store import StoredScenes, stored
from codi.training.tokenizer import train_unigram
from tiny import rand


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> PretrainRecipe:
    """Return a recipe that trains codec and transformer in seconds."""
    folder = tmp_path_factory.mktemp("flux")
    return PretrainRecipe(
        out=str(folder / "model"), data="scenes:train:12", held_out="scenes:held-out:4", scene_store=str(folder),
        size=32, network="flux", optimizer="muon", times="logit-normal", flux_width=64, flux_layers=(1, 1),
        vae_images=8, vae_batch=4, vae_crop=16, vae_widths=(8, 8, 8, 8), latent_channels=4, ldm_images=16, ldm_batch=4,
        text_width=32, text_layers=1, warmup=4, log_every=8, preview_every=16, checkpoint_every=8, device="cpu",
    )  # fmt: skip


def test_the_stock_pipeline_generates_from_a_pretrained_folder(recipe):
    out = pretrain(recipe, quiet=True)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipe, FluxPipeline)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "max_sequence_length": 40, "num_inference_steps": 2, "output_type": "pt"}
    pictures = [
        pipe("a red box on a floor", generator=torch.Generator().manual_seed(0), **options).images for _ in range(2)
    ]
    assert pictures[0].shape == (1, 3, 32, 32) and torch.equal(*pictures)
    assert (out / "training" / "ldm" / "previews" / "samples-0000016.png").is_file()


def test_training_continues_from_a_folder_in_the_flux_layout(recipe, tmp_path):
    start = pretrain(recipe, quiet=True)
    out = pretrain(replace(recipe, start=str(start), out=str(tmp_path), ldm_images=8), quiet=True)
    assert json.loads((out / "training.json").read_text()) == {"images": 24}
    before, after = (load_file(folder / "vae/diffusion_pytorch_model.safetensors") for folder in (start, out))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(UserError, match="start mini: is a StableDiffusionPipeline"):
        pretrain(replace(recipe, start="mini", out=str(tmp_path / "other")), quiet=True)


def test_the_codec_alone_can_be_trained(recipe, tmp_path):
    out = pretrain(replace(recipe, out=str(tmp_path), ldm_images=0), quiet=True)
    assert (out / "vae" / "config.json").is_file() and not (out / "model_index.json").exists()


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe, tmp_path):
    whole = replace(recipe, out=str(tmp_path / "whole"), vae=f"{pretrain(recipe, quiet=True)}/vae")
    broken = replace(whole, out=str(tmp_path / "broken"), decay_to=1.0)
    whole = replace(whole, decay_to=1.0)
    pretrain(whole, quiet=True)
    pretrain(replace(broken, ldm_images=8), quiet=True)
    pretrain(broken, quiet=True)
    for name in ("weights", "average", "optimizer"):
        first, second = (
            load_file(tmp_path / run / f"training/ldm/checkpoints/step-00000004/{name}.safetensors")
            for run in ("whole", "broken")
        )
        assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_feature_and_adversarial_losses_train_the_codec(tmp_path):
    recipe = PretrainRecipe(
        out=str(tmp_path), size=32, vae_crop=32, vae_widths=(8, 8), latent_channels=4, textures=0.0, feature_weight=0.1,
        adversarial_weight=0.1, adversarial_from=0.5,
    )  # fmt: skip
    source = open_source("scenes:train:4")
    job = CodecJob(new_vae(recipe), recipe, source, source)
    batch = next(job.batches(0, 4))
    generator = torch.Generator().manual_seed(0)
    assert set(job(batch, generator)) == {"squared", "absolute", "features", "kl"}
    job.progress = 0.3
    assert set(job(batch, generator)) == {"squared", "absolute", "features", "kl", "discriminator"}
    job.progress = 0.6
    sum(job(batch, generator).values()).backward()
    assert all(p.grad is not None for p in job.online.parameters())


def test_the_adversarial_loss_does_not_train_the_discriminator():
    discriminator, rebuilt = new_discriminator(16), rand(2, 3, 32, 32).requires_grad_(True)
    losses = adversarial_losses(discriminator, rebuilt, rand(2, 3, 32, 32), 1.0)
    losses["adversarial"].backward()
    assert rebuilt.grad is not None and all(p.grad is None for p in discriminator.parameters())
    rebuilt.grad = None
    losses["discriminator"].backward()
    assert rebuilt.grad is None and all(p.grad is not None for p in discriminator.parameters())


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalized(rand(*shape) - 0.5).float())
        assert values.min() > 0.5 and values.max() < 1.3


def test_muon_minimizes_matrices_and_other_parameters():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    groups = muon_groups(network, 1e-2)
    assert [len(group["params"]) for group in groups] == [1, 3]
    optimizer, x = Muon(groups), rand(64, 32)
    losses = []
    for _ in range(60):
        loss = (network(x) - x[:, :2]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_stored_scenes_equal_rendered_ones(tmp_path):
    plain = open_source("scenes:train:6:1", ("edited_image",))
    cached = stored(plain, tmp_path)
    assert isinstance(cached, StoredScenes) and stored(plain, None) is plain
    for _ in range(2):  # the first time rendered, then read
        for a, b in zip(plain.read([4, 1], 32), cached.read([4, 1], 32), strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.extras["edited_image"], b.extras["edited_image"])
            assert (a.text, a.instruction, a.name) == (b.text, b.instruction, b.name)
    more = stored(open_source("scenes:train:9:1"), tmp_path)
    assert torch.equal(more.read([4], 32)[0].image, plain.read([4], 32)[0].image)
    assert torch.equal(more.read([8], 32)[0].image, open_source("scenes:train:9:1").read([8], 32)[0].image)


def test_times_follow_their_distribution():
    share = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(flow_times(share, "uniform"), share)
    logit = flow_times(share, "logit-normal").logit()
    assert abs(float(logit.mean())) < 1e-3 and abs(float(logit.std()) - 1) < 1e-2


def test_unigram_pieces_are_words_and_cover_any_latin_text(tmp_path):
    tokenizer = train_unigram(["a shiny red sphere, and a red box"] * 2, tmp_path, vocabulary=500)
    assert tokenizer.tokenize("a red sphere, box") == ["▁a", "▁red", "▁sphere", ",", "▁box"]
    assert tokenizer.unk_token_id not in tokenizer("zigzag café, 12!").input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_unusable_recipe_values_are_refused():
    good = PretrainRecipe(out="x", network="flux")
    for change, message in (
        ({"network": "dit"}, "network 'dit'"), ({"optimizer": "sgd"}, "optimizer"),
        ({"flux_layers": (2,)}, "flux_layers"),
        ({"flux_width": 100}, "flux_width"), ({"times": "cosine"}, "times"),
        ({"feature_weight": 0.1, "vae_crop": 24, "size": 48}, "vae_crop 24"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            replace(good, **change).validate()
