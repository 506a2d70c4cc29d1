"""Adapters in a saved pipeline: whole files with right checksums, or no files and a one-line error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codi.errors import UserError
from codi.models.checksums import checksums, find_fault
from codi.models.lora import FILE, NOTE, save_lora
from codi.models.tiny import new_tiny
from codi.sampling.pipeline import CoDiPipeline
from codi.training.saving import list_files
from pipelines import run
from shell import make_adapter
from tiny import tiny_backbone, tiny_lora, tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def pipeline(*adapters: Path) -> CoDiPipeline:
    pipe = CoDiPipeline(**vars(tiny_backbone()))
    pipe.set_progress_bar_config(disable=True)
    for adapter in adapters:
        pipe.load_adapter(adapter)
    return pipe


def without_prefix(folder: Path, listed: bool) -> Path:
    """Turn an adapter's updates into an old file, whose keys lack the network's name."""
    updates = folder / FILE
    with safe_open(updates, "pt") as file:
        note = {key.removeprefix("unet."): value for key, value in json.loads(file.metadata()[NOTE]).items()}
    weights = {key.removeprefix("unet."): value for key, value in load_file(updates).items()}
    save_file(weights, updates, {NOTE: json.dumps(note)})
    list_files(folder)
    return folder if listed else unlisted(folder)


def unlisted(folder: Path) -> Path:
    """Turn an adapter into an old one, which does not list its files."""
    config = json.loads((folder / "config.json").read_text())
    del config["info"]["files"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("listed", [True, False])
def test_checksums_match_after_every_save(listed, tmp_path):
    old = without_prefix(make_adapter(tmp_path / "old", "generate"), listed)
    full = make_adapter(tmp_path / "full", "upscale", full=True)
    pipe, before = pipeline(old, full), (old / FILE).read_bytes()
    expected = run(pipe)
    for name in ("first", "second"):
        pipe.save_pretrained(tmp_path / name)
        for adapter in ("old", "full"):
            saved = tmp_path / name / "adapters" / adapter
            files = json.loads((saved / "config.json").read_text())["info"].get("files")
            assert files == (checksums(saved, "config.json") if listed or adapter == "full" else None)
            assert (
                len({file.stat().st_mode for file in saved.rglob("*") if file.is_file()}) == 1
            )  # all files have the same permissions
        pipe = CoDiPipeline.from_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.adapters == ["full", "old"]
        torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-5)
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "second" / "adapters" / "old" / FILE))
    assert (old / FILE).read_bytes() == before and (find_fault(old, checksums(old, "config.json")) is None)


def test_every_listed_file_of_an_adapter_is_saved(tmp_path):
    """Including files that are not .safetensors, such as the index of weights in several files."""
    adapter = make_adapter(tmp_path / "adapter", "generate")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "index.json").write_text("{}")
    list_files(adapter)
    pipeline(adapter).save_pretrained(tmp_path / "saved")
    assert CoDiPipeline.from_pretrained(tmp_path / "saved").adapters == ["adapter"]
    assert (tmp_path / "saved" / "adapters" / "adapter" / "notes" / "index.json").is_file()


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()

    return change


def train_again(folder: Path) -> None:
    """Replace the adapter by other weights of the same sizes."""
    shutil.rmtree(folder)
    make_adapter(folder, "generate")
    save_file({k: v + 1 for k, v in load_file(folder / FILE).items()}, folder / FILE)
    list_files(folder)


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("generate", shutil.rmtree, "the folder is gone"),
        ("generate", remove("config.json"), "config.json is missing"),
        ("generate", remove(WEIGHTS), f"{WEIGHTS} is missing"),
        ("generate", remove(FILE), f"{FILE} is missing"),
        ("generate", train_again, f"{FILE} was altered"),
        ("full", remove(f"unet/{WEIGHTS}"), f"unet/{WEIGHTS} is missing"),
        ("unlisted", remove(WEIGHTS), "diffusion_pytorch_model.* is missing"),
        ("unlisted", remove(FILE), f"{FILE} is missing"),
        ("unlisted-full", lambda folder: shutil.rmtree(folder / "unet"), "the network that belongs to it is missing"),
    ],
)
def test_missing_files_of_an_adapter_are_refused_before_anything_is_written(kind, change, fault, tmp_path):
    full = kind.endswith("full")
    adapter = make_adapter(tmp_path / "adapter", "upscale" if full else "generate", full=full)
    pipe = pipeline(unlisted(adapter) if kind.startswith("unlisted") else adapter)
    pipe.save_pretrained(tmp_path / "before")
    before = checksums(tmp_path / "before", "")
    change(adapter)
    for place in ("new", "before"):
        with pytest.raises(UserError, match=fault) as caught:
            pipe.save_pretrained(tmp_path / place)
        assert str(caught.value).startswith(f"{adapter}: the adapter 'adapter' was loaded from there, but ")
        assert "\n" not in str(caught.value) and "put its files back" in str(caught.value)
    assert checksums(tmp_path / "before", "") == before
    assert sorted(path.name for path in tmp_path.iterdir() if path != adapter) == ["before"]


def test_saving_to_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="taken: is a file: name a folder"):
        pipeline().save_pretrained(tmp_path / "taken")
    with pytest.raises(UserError, match="below: cannot be written .Not a directory."):
        pipeline().save_pretrained(tmp_path / "taken" / "below")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_saved_pipeline_opens_with_its_adapters_and_its_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    pipe = pipeline(make_adapter(tmp_path / "one", "generate"), make_adapter(tmp_path / "two", "upscale"))
    pipe.set_adapters("two", 0.5)
    pipe.tiny_vae = new_tiny(pipe.vae, 8, (1,) * 3)
    pipe.save_pretrained(tmp_path / "saved")
    opened = {
        "ours": CoDiPipeline.from_pretrained(tmp_path / "saved"),
        "full": CoDiPipeline.from_pretrained(tmp_path / "saved", decoder="full"),
        "stock": DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True),
    }
    for name, again in opened.items():
        assert again.adapters == ["one", "two"] and again.get_active_adapters() == ["two"], name
        assert (again.tiny_vae is None) == (name == "full")
    pipe.register_to_config(note="mine")  # registering a setting loads nothing
    assert pipe.adapters == ["one", "two"] and pipeline().adapters == []


def test_a_lora_merged_into_the_backbone_is_saved(tmp_path):
    """As the README recommends for users' LoRAs."""
    pipeline().save_pretrained(tmp_path / "model")
    save_lora(tiny_lora(tiny_unet(), "x", seed=3), tmp_path / "lora", "x")
    styled = pipeline()
    plain = run(styled)
    styled.load_lora_weights(str(tmp_path / "lora"), adapter_name="style")
    merged = CoDiPipeline.from_pretrained(tmp_path / "model", loras={str(tmp_path / "lora"): 1.0})
    merged.save_pretrained(tmp_path / "saved")
    again = CoDiPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(again), run(styled), rtol=0, atol=1e-4)
    assert again.get_list_adapters() == {} and not torch.allclose(run(again), plain, atol=1e-3)
