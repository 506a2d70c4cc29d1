"""Tiny decoders: training pairs, training and resuming, and use in place of the full decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from codi.apps.models import embedded
from codi.data.sources import open_source
from codi.errors import UserError
from codi.models import codec
from codi.models.backbones import EMBEDDED, load_vae
from codi.models.tiny import new_tiny, open_decoder
from codi.sampling.pipeline import CoDiPipeline
from codi.training.codec import psnr
from codi.training.decoder import DecoderRecipe, distill_decoder
from codi.training.pairs import latents_of_images, make_pairs, parse_samples
from folders import noise
from pipelines import inputs_for, run
from shell import make_adapter
from tiny import rand, tiny_checkpoint, tiny_vae


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> DecoderRecipe:
    """A run of four updates of two crops, from eight images and two textures."""
    folder = tmp_path_factory.mktemp("decoder")
    tiny_checkpoint(folder / "model")
    (folder / "pictures").mkdir()
    for i in range(8):
        noise(40, 40, i).save(folder / "pictures" / f"{i}.png")
    return DecoderRecipe(
        out=str(folder / "out"), model=str(folder / "model"), data=str(folder / "pictures"), textures=2,
        held_out=str(folder / "pictures"), size=32, crop=16, width=8, blocks=(1, 1, 0), images=8, batch_size=2,
        warmup=2, learning_rate=1e-2, log_every=2, preview_every=4, checkpoint_every=4, device="cpu", half=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(recipe) -> Path:
    """The output folder of the uninterrupted run."""
    return distill_decoder(recipe, quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# ---- training


def test_resumed_decoder_training_equals_uninterrupted(recipe, finished, tmp_path, monkeypatch):
    from codi.training import decoder

    interrupted = replace(recipe, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        updates: list[int] = []

        def forward(self, batch, generator, full=decoder.TinyJob.forward):
            updates.append(1)
            if len(updates) == 3:
                raise KeyboardInterrupt
            return full(self, batch, generator)

        patch.setattr(decoder.TinyJob, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            distill_decoder(interrupted, quiet=True)
    resumed, uninterrupted = weights(distill_decoder(interrupted, quiet=True)), weights(finished)
    assert resumed.keys() == uninterrupted.keys() and all(
        torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted
    )
    with pytest.raises(UserError, match="width 8, not 16"):
        distill_decoder(replace(interrupted, width=16), quiet=True)


def test_tiny_decoder_approaches_the_full_decoder(recipe, tmp_path):
    long = replace(recipe, out=str(tmp_path / "run"), images=320, batch_size=4, preview_every=160, encoder_weight=0.0)
    out = distill_decoder(long, quiet=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [row["squared"] for row in rows if "squared" in row]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    figures = [row["psnr_to_full"] for row in rows if "psnr_to_full" in row]
    record = json.loads((out / "training.json").read_text())
    assert figures[-1] > figures[0] and record["metrics"]["psnr_to_full"] == pytest.approx(figures[-1])
    assert record["images"] == 320 and record["recipe"]["model"] == "model"  # without its folder
    assert "not trained" in (out / "README.md").read_text() and list((out / "previews").glob("*.png"))


def test_pairs_are_written_once_and_resume(tmp_path):
    vae, source = tiny_vae().requires_grad_(False), open_source("scenes:train:20")
    origin = latents_of_images(vae, source, 20, 32, 0.2, 0)

    def make(name, limit=None, source_of_latents=origin, version=0):
        calls: list[int] = []

        def counted(numbers):
            calls.append(numbers[0])
            if limit is not None and len(calls) > limit:
                raise KeyboardInterrupt
            return source_of_latents(numbers)

        return make_pairs(vae, counted, 24, 32, tmp_path / name, {"mark": version}), calls

    uninterrupted, _ = make("whole")
    with pytest.raises(KeyboardInterrupt):
        make("parts", limit=4)
    resumed, calls = make("parts")
    assert uninterrupted and resumed and calls == [16, 20]
    assert all(np.array_equal(a, b) for a, b in zip(vars(uninterrupted).values(), vars(resumed).values(), strict=True))
    z, pictures = uninterrupted.at([3, 21])  # a scene and a texture
    torch.testing.assert_close(codec.decode(vae, z), pictures, atol=0.5 / 255 + 1e-5, rtol=0)
    assert make("parts")[1] == [] and make("parts", version=1)[1] == [0, 4, 8, 12, 16, 20]
    clean = codec.encode(vae, open_source("scenes:train:20").read([3], 32)[0].image[None])  # type: ignore[union-attr]
    assert 0 < float((uninterrupted.at([3])[0] - clean).std()) < 0.25
    assert make_pairs(vae, origin, 24, 32, tmp_path / "late", {}, deadline=1e-9) is None


def test_unreadable_images_are_skipped_or_refused(tmp_path):
    for i in range(3):
        noise(32, 32, i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    vae = tiny_vae().requires_grad_(False)
    origin = latents_of_images(vae, open_source(tmp_path), 3, 32, 0.0, 0)
    pairs = make_pairs(vae, origin, 3, 32, tmp_path / "pairs", {})
    assert pairs and len(pairs.latents) == len(pairs.pictures) == 2
    assert json.loads((tmp_path / "pairs" / "corrupt.json").read_text())["skipped"] == 1
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no other file is readable"):
        make_pairs(vae, latents_of_images(vae, open_source(tmp_path), 3, 32, 0.0, 0), 3, 32, tmp_path / "none", {})


def test_decoder_trains_on_samples_of_the_model(recipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n\n a blue box \n")
    sampled = replace(
        recipe, out=str(tmp_path / "own"), data="samples:6", held_out="samples:2:1", sample_steps=2, textures=0
    )
    out = distill_decoder(sampled, quiet=True)
    prompted = distill_decoder(
        replace(sampled, out=str(tmp_path / "prompted"), prompts=str(tmp_path / "prompts.txt")), quiet=True
    )
    z, z_prompted = (np.load(o / "pairs" / "train" / "latents.npy") for o in (out, prompted))
    assert z.shape == (6, 4, 8, 8) and len({row.tobytes() for row in z}) == 6 and not np.array_equal(z, z_prompted)
    assert AutoencoderTiny.from_pretrained(out)
    assert parse_samples("samples:5:2") == (5, 2) and parse_samples("scenes:train:5") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "samples:0"}, "samples:COUNT"),
        ({"data": "samples:many"}, "samples:COUNT"),
        ({"data": "samples:4"}, "textures 2: cannot be added to samples"),
        ({"crop": 64}, "must lie between 1 and size"),
        ({"crop": 18}, "crop 18: not a multiple of 4"),
        ({"size": 34}, "size 34: not a multiple of 4"),
        ({"blocks": (1, 1)}, "this VAE has 3 resolutions"),
        ({"blocks": (1, -1, 0)}, "whole numbers from 0 up"),
        ({"noise": -1.0}, "noise -1.0"),
        ({"gradient_checkpointing": True}, "leave it out"),
        ({"model": "nowhere/at/all"}, "no model there"),
        ({"data": "samples:2", "textures": 0, "prompts": "missing.txt"}, "missing.txt: cannot be read"),
    ],
)
def test_invalid_decoder_recipes_are_refused(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        distill_decoder(replace(recipe, out=str(tmp_path / "run"), **changes), quiet=True)


def test_load_vae_reads_only_the_vae(tmp_path):
    """So models with unsupported text encoders or networks work too."""
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert torch.equal(next(load_vae(tmp_path / "model").parameters()), next(tiny_vae().parameters()))
    (tmp_path / "model" / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match="its VAE could not be loaded"):
        load_vae(tmp_path / "model")


def test_load_vae_takes_fp16_variants_and_revisions(tmp_path, monkeypatch):
    tiny_vae().half().save_pretrained(tmp_path / "model" / "vae", variant="fp16")
    vae = load_vae(tmp_path / "model")
    assert vae.dtype == torch.float32
    assert torch.equal(next(vae.parameters()), next(tiny_vae().half().float().parameters()))
    requested = {}

    def fetch(source, **options):
        requested.update(options, source=source)
        return tiny_vae()

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", fetch)
    config = {"_class_name": "AutoencoderKL"}
    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", lambda *_, **__: config)
    load_vae("owner/model@v2")
    assert (requested["source"], requested["revision"]) == ("owner/model", "v2") and "variant" not in requested


# ---- the layout


@pytest.mark.parametrize(("channels", "levels"), [(4, 4), (8, 3), (16, 2)])
def test_tiny_decoder_stages_and_channels_match_the_vae(channels, levels):
    vae = AutoencoderKL(
        block_out_channels=(4,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=2, latent_channels=channels,  # type: ignore[arg-type]
        scaling_factor=0.18215, shift_factor=0.1,
    )  # fmt: skip
    tiny = new_tiny(vae, 8, (1,) * levels)
    image = rand(1, 3, 32, 48)
    with torch.no_grad():
        z = codec.encode(vae, image)
        assert codec.decode(tiny, z).shape == codec.decode(vae, z).shape == image.shape
        assert tiny.encode(image).latents.shape == z.shape  # type: ignore[union-attr]
    assert codec.downscale(tiny) == codec.downscale(vae)


def test_stock_diffusers_loads_the_decoder_and_gives_the_same_image(recipe, finished):
    """A latent of the sampler, decoded by a stock pipeline with the tiny decoder as its VAE."""
    ours = CoDiPipeline.from_pretrained(recipe.model, decoder=finished)
    ours.set_progress_bar_config(disable=True)
    assert ours.tiny_vae is not None
    picture, latent = (ours(steps=2, seed=3, output_type=kind).images for kind in ("pt", "latent"))  # type: ignore[union-attr]
    stock = AutoencoderTiny.from_pretrained(finished)
    with torch.no_grad():
        decoded = stock.decode(latent).sample  # type: ignore[union-attr]
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), picture)
    pipe = StableDiffusionPipeline.from_pretrained(recipe.model, vae=stock)
    pipe.set_progress_bar_config(disable=True)
    drawn: Any = pipe("", num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    assert pipe.vae_scale_factor == 4 and drawn.images.shape == (1, 3, 32, 32)
    with torch.no_grad():
        postprocessed = pipe.image_processor.postprocess(
            pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample, output_type="pt"
        )
    torch.testing.assert_close(postprocessed, picture)


# ---- use


def test_decoder_of_another_latent_space_is_refused(recipe, finished, tmp_path):
    vae = tiny_vae()
    eight: Any = AutoencoderTiny(latent_channels=8, decoder_block_out_channels=(8,) * 3, num_decoder_blocks=(1, 1, 0))
    cases = {"channels": eight, "scale": AutoencoderTiny(latent_channels=4)}
    for name, other in cases.items():
        other.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=r"is for latents of . channels, . px a cell, and those of .* have 4 and 4"):
            CoDiPipeline.from_pretrained(recipe.model, decoder=tmp_path / name)
    vae.save_pretrained(tmp_path / "full")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((finished / "config.json").read_text())
    for name, message in (
        ("full", "is of class AutoencoderKL"), ("broken", "could not be loaded"), ("missing", "no config.json there"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_decoder(tmp_path / name, recipe.model, vae)
    with pytest.raises(UserError, match="there is no tiny_vae in"):
        open_decoder("tiny", recipe.model, vae)
    assert open_decoder("full", recipe.model, vae) is open_decoder(None, recipe.model, vae) is None


def test_saved_pipeline_keeps_its_decoder(recipe, finished, tmp_path, caplog):
    pipe = CoDiPipeline.from_pretrained(recipe.model, decoder=finished)
    full_pipe = CoDiPipeline.from_pretrained(recipe.model)
    tiny, full = (run(_without_progress_bar(p)) for p in (pipe, full_pipe))
    assert not torch.allclose(tiny, full, atol=1e-3)
    pipe.save_pretrained(tmp_path / "saved")
    for decoder, expected in ((None, tiny), ("tiny", tiny), ("full", full)):
        reloaded = _without_progress_bar(CoDiPipeline.from_pretrained(tmp_path / "saved", decoder=decoder))
        assert torch.equal(run(reloaded), expected)
    reloaded.save_pretrained(tmp_path / "saved")  # overwrites, now with the full decoder
    assert torch.equal(run(_without_progress_bar(CoDiPipeline.from_pretrained(tmp_path / "saved"))), full)
    caplog.clear()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert "not expected" not in caplog.text
    half = pipe.to(torch.bfloat16)
    assert half.tiny_vae.dtype == torch.bfloat16 and run(half).isfinite().all()


def _without_progress_bar(pipe: CoDiPipeline) -> CoDiPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_tiles_use_the_tiny_decoder_and_conditions_the_vae(recipe, finished, tmp_path, monkeypatch):
    make_adapter(tmp_path / "upscale", "upscale")
    pipe = _without_progress_bar(
        CoDiPipeline.from_pretrained(recipe.model, task="upscale", adapter=tmp_path / "upscale", decoder=finished)
    )
    monkeypatch.setattr(pipe.vae, "decode", None)
    encoded: list[int] = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    output = run(pipe, **inputs_for("upscale", 24, 32), tile=16)
    assert output.shape == (1, 3, 96, 128) and output.isfinite().all() and encoded


def test_commands_train_and_use_a_decoder(shell, recipe, tmp_path, monkeypatch):
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(recipe).items()}
    (tmp_path / "own.yaml").write_text(json.dumps({**values, "out": str(tmp_path / "run")}))
    ran = shell("distill-decoder", tmp_path / "own.yaml", "--json")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["finished"] and result["images"] == 8 and result["metrics"]["psnr_to_full"] > 0
    assert "--encoder-weight 0.1" in shell("distill-decoder", "--keys").out
    shell("distill-decoder", tmp_path / "own.yaml", "--noise", -1).failed(2, "noise -1")

    adapter = make_adapter(tmp_path / "generate", "generate")
    base = ("--model", recipe.model, "--adapter", adapter, "--device", "cpu", "--steps", 1)
    out = tmp_path / "a.png"
    assert shell("generate", *base, "-o", out, "--decoder", tmp_path / "run").code == 0
    assert Image.open(out).info["codi decoder"] == "run"
    assert shell("generate", *base, "-o", tmp_path / "b.png").code == 0
    assert "codi decoder" not in Image.open(tmp_path / "b.png").info
    assert out.read_bytes() != (tmp_path / "b.png").read_bytes()
    shell("generate", *base, "-o", tmp_path / "c.png", "--decoder", "tiny").failed(1, "there is no tiny_vae")

    def refuse(*arguments):
        raise UserError(f"decoder {arguments[-1]}")

    monkeypatch.setattr("codi.apps.evaluate.load_pipeline", refuse)
    shell("evaluate", "--task", "generate", "--decoder", "tiny").failed(1, "decoder tiny")


def test_embedded_decoder_is_listed_with_its_model(finished, tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "tiny_vae").symlink_to(finished)
    (row,) = embedded(tmp_path)
    assert (row["name"], row["kind"]) == ("tiny", "decoder") and row["bytes"] > 1000
    assert row["origin"] == "distilled for mini, 8 crops, pictures"


def test_embedded_tiny_decoder_approximates_the_full_decoder():
    folder = EMBEDDED / "mini" / "tiny_vae"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1.5e6
    vae = load_vae("mini")
    tiny = open_decoder("tiny", "mini", vae)
    assert tiny is not None
    image = torch.stack([s.image for s in open_source("scenes:held-out:8").read(range(8), 64)])  # type: ignore[union-attr]
    with torch.no_grad():
        z = codec.encode(vae, image)
        assert psnr(codec.decode(tiny, z), codec.decode(vae, z)) > 31
        assert psnr(codec.decode(vae, tiny.encode(image * 2 - 1).latents), image) > 15  # type: ignore[union-attr]
    assert StableDiffusionPipeline.from_pretrained(EMBEDDED / "mini", vae=tiny).vae is tiny
