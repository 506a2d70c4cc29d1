"""Pretraining a backbone: the codec's latents, the tokenizer, both stages end to end, and the shipped model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from codi.data.sources import open_source
from codi.errors import UserError
from codi.models import codec
from codi.models.backbones import EMBEDDED, load_backbone
from codi.training.codec import DecoderJob, standardise_latents
from codi.training.pretrain import pretrain
from codi.training.pretrain_recipe import PretrainRecipe
from codi.training.tokenizer import train_tokenizer
from codi.training.trainer import RunSettings, train
from codi.training.unet import new_scheduler
from folders import noise
from tiny import rand, tiny_vae


def test_standardized_latents_have_unit_variance_and_decode_as_before():
    vae = tiny_vae().double()
    image = rand(8, 3, 32, 32).double()
    with torch.no_grad():
        before = vae.encode(image * 2 - 1).latent_dist
        rebuilt = vae.decode(before.mean).sample / 2 + 0.5
        spread = before.std / before.mean.std((0, 2, 3), keepdim=True)
        standardise_latents(vae, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))
        after = vae.encode(image * 2 - 1).latent_dist
        latent = codec.encode(vae, image)
        torch.testing.assert_close(codec.decode(vae, latent, clamp=False), rebuilt, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(latent.std((0, 2, 3)), torch.ones(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(after.std, spread, atol=1e-6, rtol=1e-6)  # the posterior is scaled like the latent


def test_frequent_words_are_one_token_and_any_latin_text_is_covered(tmp_path):
    tokenizer = train_tokenizer(["a large shiny red sphere on a brown floor"] * 3, tmp_path, vocabulary=1000)
    assert tokenizer.tokenize("a shiny Red sphere") == ["a</w>", "shiny</w>", "red</w>", "sphere</w>"]
    assert tokenizer.unk_token_id not in tokenizer("zigzag café, 12!", add_special_tokens=False).input_ids
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}


def test_equal_texts_give_equal_vocabularies(tmp_path):
    """Ties included, so repeated pretraining trains the same model."""
    texts = [f"a {colour} {shape} at dusk" for colour in ("red", "blue", "green") for shape in ("ball", "cone", "cube")]
    first, again = (train_tokenizer(texts, tmp_path / name, vocabulary=560) for name in ("first", "again"))
    assert first.get_vocab() == again.get_vocab() and len(first) <= 560
    assert (tmp_path / "first/merges.txt").read_text() == (tmp_path / "again/merges.txt").read_text()


def test_the_noisiest_level_has_no_signal():
    scheduler = new_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config["prediction_type"] == "v_prediction"


def test_a_decoder_trains_without_its_encoder(tmp_path):
    recipe = PretrainRecipe(
        out=str(tmp_path), size=32, vae_crop=16, vae_batch=4, warmup=4, decoder_images=8, log_every=8, device="cpu"
    )
    source, vae = open_source("scenes:train:8"), tiny_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings = RunSettings(images=8, batch_size=4, warmup=1, learning_rate=1e-2, device="cpu", ema=0.0)
    train(DecoderJob(vae, recipe, source, source), settings, tmp_path, quiet=True)
    after = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> PretrainRecipe:
    """Return a recipe that trains both stages in seconds."""
    return PretrainRecipe(
        out=str(tmp_path_factory.mktemp("pretrain") / "model"), data="scenes:train:16", held_out="scenes:held-out:4",
        size=32, vae_images=16, vae_batch=4, vae_crop=16, vae_widths=(8, 8, 8), latent_channels=4, ldm_images=16,
        edits="scenes:train:8:1", decoder_images=8,
        ldm_batch=4, unet_widths=(16, 32), unet_layers=1, text_width=32, text_layers=1, warmup=4, log_every=8,
        preview_every=16, checkpoint_every=8, device="cpu",
    )  # fmt: skip


def test_a_pretrained_folder_is_a_stable_diffusion_checkpoint(recipe):
    out = pretrain(recipe, quiet=True)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red box on a gray plain floor at noon", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert picture.size == (32, 32)
    assert json.loads((out / "training.json").read_text()) == {"images": 16}
    logged = [json.loads(line) for line in (out / "training" / "ldm" / "log.jsonl").read_text().splitlines()]
    assert any("held_out_velocity" in row for row in logged)
    stages = {p.name for p in (out / "training").iterdir()}
    assert {"codec", "ldm", "latents.npy"} <= stages and "finished" not in stages

    # The same command has nothing left to do, and more images continue the training.
    before = load_backbone(out).unet.state_dict()
    pretrain(recipe, quiet=True)
    assert all(torch.equal(before[k], v) for k, v in load_backbone(out).unet.state_dict().items())
    pretrain(replace(recipe, ldm_images=24), quiet=True)
    assert json.loads((out / "training.json").read_text()) == {"images": 24}


def test_a_half_replaced_model_is_refused_until_repaired(recipe, monkeypatch):
    """The same command repairs it."""
    out, rename = pretrain(recipe, quiet=True), Path.rename

    def interrupt(self, target):
        if self.name == "unet":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(Path, "rename", interrupt)
        pretrain(recipe, quiet=True)
    with pytest.raises(UserError, match="no model there"):
        load_backbone(out)
    assert load_backbone(pretrain(recipe, quiet=True)).unet


def test_only_scenes_add_the_vocabulary_of_scenes(recipe, tmp_path, monkeypatch):
    corpora: list[list[str]] = []

    def record(texts, *_):
        corpora.append(texts)
        raise InterruptedError

    monkeypatch.setattr("codi.training.pretrain.train_tokenizer", record)
    noise(32, 32).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}')
    short = replace(recipe, vae_images=4, decoder_images=0, edits=None)
    for name, data in (("scenes", "scenes:train:4"), ("own", str(tmp_path))):
        with pytest.raises(InterruptedError):
            pretrain(replace(short, out=str(tmp_path / name), data=data), quiet=True)
    assert len(corpora[0]) == 2_004 and corpora[1] == ["a cat"]


def test_training_continues_from_a_checkpoint(recipe, tmp_path):
    pretrain(recipe, quiet=True)
    again = replace(recipe, start=recipe.out, out=str(tmp_path / "more"), ldm_images=8, decoder_images=0)
    more = load_backbone(pretrain(again, quiet=True))
    start = load_backbone(recipe.out)
    assert all(torch.equal(a, b) for a, b in zip(start.vae.parameters(), more.vae.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(start.unet.parameters(), more.unet.parameters(), strict=True)]
    assert any(moved) and more.family == start.family
    tuned = replace(again, out=str(tmp_path / "tuned"), tune_codec=True, vae_images=8)
    tuned_vae = load_backbone(pretrain(tuned, quiet=True)).vae
    before, after = start.vae.state_dict(), tuned_vae.state_dict()
    assert not any(torch.equal(before[f"{part}.conv_in.weight"], after[f"{part}.conv_in.weight"]) for part in
                   ("encoder", "decoder"))  # fmt: skip
    with pytest.raises(UserError, match="tune_codec"):
        replace(tuned, start=None).validate()


def test_the_shipped_checkpoint_is_a_small_stock_model():
    folder = EMBEDDED / "mini"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 64 * 2**20
    assert not [p for p in EMBEDDED.rglob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pkl")]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompt = "a large matte red sphere on a gray plain floor at noon"
    image = pipe(prompt, num_inference_steps=10, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and float(image.std()) > 0.05
