"""Adapters and backbones on disk: saving and loading agree; broken files and those of other models are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from codi.errors import UserError
from codi.models import text
from codi.models.adapter import FORMS, FusedAdapter
from codi.models.adapter_files import load_adapter, own_network
from codi.models.backbones import EMBEDDED, digest, load_backbone, load_vae
from codi.models.backbones.stable_diffusion import fingerprint as family
from codi.models.checksums import checksum, find_fault
from codi.models.lora import FILE
from codi.models.student import Conditioning, Student
from codi.sampling.pipeline import CoDiPipeline
from codi.training.codec import open_vae
from codi.training.saving import save_adapter
from tiny import (
    CAPTIONS,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    influence,
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


def test_pruned_and_deep_backbones_have_families_of_their_own():
    """XL, SSD-1B and Segmind's smaller models share widths."""
    plain, base = tiny_unet(), BACKBONE.family
    deep = tiny_unet(transformer_layers_per_block=[1, 2])
    pruned = tiny_unet(mid_block_type=None)
    families = [family(unet, BACKBONE.vae, BACKBONE.scheduler) for unet in (plain, deep, pruned)]
    assert families == [base, f"{base}-depth1/2", f"{base}-nomid"]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_an_adapter_is_saved_and_loaded(form, channels, tmp_path):
    info = {"task": "upscale", "family": BACKBONE.family, "steps": 4, "metrics": {"psnr": 30.5}}
    student = influence(Student(UNET, FORMS[form].from_backbone(UNET, VAE, channels)))
    adapter: Any = student.adapter
    adapter.register_to_config(info=info)
    save_adapter(tmp_path / "adapter", adapter, student.network, full=False, half=False)
    written = json.loads((tmp_path / "adapter/config.json").read_text())["info"]
    names = {p.name for p in (tmp_path / "adapter").iterdir()} - {"config.json"}
    assert written.keys() - info.keys() == {"files"} and written["files"].keys() == names and written | info == written
    assert not list(tmp_path.rglob("*.bin"))
    loaded, unet = load_adapter(tmp_path / "adapter", "upscale", BACKBONE.family, UNET)
    assert type(loaded) is type(adapter) and dict(loaded.config["info"]) == written
    assert (unet is UNET) == (form != "lora")
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), adapter.state_dict().values(), strict=True)
    )
    z = randn(2, LATENT_CHANNELS, 8, 8)
    conditioning = Conditioning(WORDS, adapter.read(rand(2, channels, 32, 32), VAE))
    assert torch.equal(Student(unet, loaded)(z, LEVELS, conditioning), student(z, LEVELS, conditioning))


@torch.no_grad()
def test_a_full_adapter_loads_its_own_unet(tmp_path):
    FusedAdapter.from_backbone(UNET, VAE).save_pretrained(tmp_path)
    trained = tiny_unet(seed=9)
    trained.save_pretrained(tmp_path / "unet")
    _, unet = load_adapter(tmp_path, None, None, UNET)
    assert unet is not UNET
    assert all(
        torch.equal(a, b) for a, b in zip(unet.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def test_hub_options_are_passed_on(tmp_path, monkeypatch):
    built, passed = StableDiffusionPipeline.from_pretrained(tiny_checkpoint(tmp_path / "plain")), {}
    built.save_pretrained(tmp_path / "halves", variant="fp16")
    for options in ({"variant": "fp16", "local_files_only": True}, {}):  # a folder's only variant is the default
        loaded = load_backbone(tmp_path / "halves", **options)
        assert digest(loaded.unet) == digest(built.unet)  # type: ignore[attr-defined]
    refused(lambda: load_backbone(tmp_path / "plain", revison="main"), "revison: no such option", "'revision'")  # type: ignore[call-arg]

    def record(source, **options):
        passed.update(options)
        return built

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", record)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **options: dict(built.config))
    options = {"token": "t", "cache_dir": tmp_path}
    for name, revision in (("somebody/model", {"revision": "v2"}), ("somebody/model@v2", {})):
        passed.clear()
        CoDiPipeline.from_pretrained(name, **options, **revision)  # type: ignore[arg-type]
        assert {**options, "revision": "v2"}.items() <= passed.items() and "variant" not in passed


def test_a_digest_identifies_weights_but_adapters_load_into_others(tmp_path):
    stored = tiny_unet().half().float()
    assert digest(tiny_unet()) == digest(stored) == digest(tiny_unet().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    assert digest(tiny_unet(seed=9)) != digest(stored) and len(digest(stored)) == 12
    adapter = FusedAdapter.from_backbone(UNET, VAE)
    adapter.register_to_config(info={"family": BACKBONE.family, "backbone": digest(tiny_unet(seed=9))})
    adapter.save_pretrained(tmp_path)
    load_adapter(tmp_path, None, BACKBONE.family, UNET)  # adapters of a backbone load into its fine-tunes


def test_the_shipped_adapters_fit_mini_and_all_weights_are_small():
    mini = load_backbone("mini")
    backbone_digest = digest(mini.unet)
    adapters = {folder.parent.name for folder in (EMBEDDED / "adapters").glob("*/config.json")}
    assert adapters >= {"upscale", "inpaint", "depth", "canny", "edit", "generate", "upscale-x8", "upscale-real"}
    for name in adapters:
        info = load_adapter(name, None, mini.family, mini.unet)[0].config["info"]
        assert info["backbone"] == backbone_digest and info["finished"] and not info["full"], name
    sizes = {path: path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")}
    photo_size = sum(size for path, size in sizes.items() if EMBEDDED / "photo" in path.parents)
    assert photo_size <= 90e6 and sum(sizes.values()) - photo_size <= 120e6


def refused(attempt, *parts: str) -> str:
    """Return the message of the UserError that `attempt` raises: one line that contains `parts`."""
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
    """Return a copy of `folder` whose file `name` went through `change(path)`."""
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


def unlisted(folder: Path, **info: Any) -> Path:
    """Remove the list of files from an adapter, as earlier versions wrote it."""
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values["info"] = {key: value for key, value in {**values["info"], **info}.items() if key != "files"}
    config.write_text(json.dumps(values))
    return folder


def test_adapters_of_other_families_and_tasks_are_refused(adapter_folder):
    other_family = "4ch-f8-320/640/1280/1280x2-text768-epsilon"
    refused(
        lambda: load_adapter(adapter_folder, None, other_family, UNET),
        str(adapter_folder),
        BACKBONE.family,
        other_family,
    )
    refused(lambda: load_adapter(adapter_folder, "inpaint", None, UNET), str(adapter_folder), "'upscale'", "'inpaint'")
    load_adapter(adapter_folder, None, None, UNET)


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_missing_adapter_is_refused(missing, tmp_path):
    refused(lambda: load_adapter(tmp_path / missing, "upscale", None, UNET), str(tmp_path), "no adapter there")


@pytest.mark.parametrize(
    ("change", "message"),
    [(nan, "NaN"), (truncate, "could not be read"), (drop, "is missing"), (pickled, "could not be read")],
)
def test_broken_adapter_weights_are_refused(change, message, adapter_folder, tmp_path):
    bad = unlisted(broken(adapter_folder, tmp_path / "bad", "diffusion_pytorch_model.safetensors", change))
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad), message)


@pytest.mark.parametrize(("change", "message"), [(nan, "NaN"), (truncate, "could not be read")])
def test_broken_low_rank_updates_are_refused(change, message, adapter_folder, tmp_path):
    bad = unlisted(broken(adapter_folder, tmp_path / "bad", FILE, change))
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad / FILE), message)


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    adapter = FusedAdapter.from_backbone(UNET, VAE)
    adapter.register_to_config(info={"task": "upscale", "family": BACKBONE.family, "full": True})
    save_adapter(folder, adapter, tiny_unet(seed=9), full=True, half=False)
    return folder


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("change", [nan, drop, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [WEIGHTS, FILE, f"unet/{WEIGHTS}", "unet/config.json"])
def test_altered_or_missing_files_of_an_adapter_are_refused(adapter_folder, full_folder, name, change, tmp_path):
    folder = full_folder if name.startswith("unet") else adapter_folder
    load_adapter(folder, "upscale", BACKBONE.family, UNET)
    if name.endswith(".json") and change in (nan, drop):
        change = lambda path: path.write_text(path.read_text().replace("8", "9"))  # noqa: E731
    bad = broken(folder, tmp_path / "bad", name, change)
    fault = "was altered or damaged" if (bad / name).exists() else "is missing"
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), f"{bad}: {name} {fault}")


@pytest.mark.parametrize("files", [None, [], "x", {WEIGHTS: 3}, {"../../no": "0"}])
def test_an_invalid_list_of_files_is_refused(files, adapter_folder, tmp_path):
    bad = unlisted(shutil.copytree(adapter_folder, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    config["info"]["files"] = files
    (bad / "config.json").write_text(json.dumps(config))
    refused(lambda: load_adapter(bad, "upscale", BACKBONE.family, UNET), str(bad))


def test_older_adapters_load_unless_they_are_evidently_incomplete(adapter_folder, full_folder, tmp_path):
    shared = unlisted(shutil.copytree(adapter_folder, tmp_path / "shared"), recipe={"lora_rank": 2}, full=False)
    full = unlisted(shutil.copytree(full_folder, tmp_path / "full"))
    for folder in (shared, full):
        load_adapter(folder, "upscale", BACKBONE.family, UNET)
    (shared / FILE).unlink()
    shutil.rmtree(full / "unet")
    refused(lambda: load_adapter(shared, "upscale", BACKBONE.family, UNET), f"{shared}: {FILE} is missing")
    refused(lambda: load_adapter(full, "upscale", BACKBONE.family, UNET), f"{full}: the network that belongs to it")
    FORMS["lora"].from_backbone(UNET, VAE).save_pretrained(tmp_path / "lora")  # without updates it does nothing
    refused(lambda: load_adapter(tmp_path / "lora", None, None, UNET), f"{FILE} is missing")
    unlisted(shared, recipe={"lora_rank": 0})
    load_adapter(shared, "upscale", BACKBONE.family, UNET)


def test_only_listed_files_are_loaded(adapter_folder, full_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    expected = load_adapter(folder, "upscale", None, UNET)[1].state_dict().keys()
    shutil.copytree(full_folder / "unet", folder / "unet")
    assert own_network(folder) is None
    assert load_adapter(folder, "upscale", None, UNET)[1].state_dict().keys() == expected
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    refused(lambda: load_adapter(folder, "upscale", None, UNET), f"{folder}: {WEIGHTS}.index.json is not in its list")


@pytest.mark.parametrize("absolute", [False, True])
def test_listed_files_outside_the_folder_are_refused(absolute, adapter_folder, tmp_path):
    folder, outside = shutil.copytree(adapter_folder, tmp_path / "adapter"), tmp_path / "outside"
    outside.write_text("secret")
    values, name = json.loads((folder / "config.json").read_text()), str(outside) if absolute else "../outside"
    values["info"]["files"][name] = checksum(outside)
    (folder / "config.json").write_text(json.dumps(values))
    refused(lambda: load_adapter(folder, "upscale", None, UNET), f"{folder}: its list of files names {name}, which is")


def test_shipped_adapters_list_their_files():
    for config in EMBEDDED.rglob("adapters/*/config.json"):
        files = {p.relative_to(config.parent).as_posix() for p in config.parent.rglob("*") if p.is_file()}
        listed = json.loads(config.read_text())["info"]["files"]
        assert listed.keys() == files - {"config.json"} and find_fault(config.parent, listed) is None, config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("condition_channels", value) for value in (-1, 0, 10**12, "3", 3.5, True)),
        *(("guidance_scales", value) for value in (-1, 3, "1")),
        *(("downscale", value) for value in (0, -8, 10**9)),
        *(("depth", value) for value in (0, -1, 10**9, "2")),
        *(("info.guidance_scale", value) for value in (-1, "2", [2], float("nan"), float("inf"), True)),
        *(("info.shift", value) for value in (0, -1, "3", float("nan"), {})),
        ("info.embedded_guidance", "x"), ("info.image_guidance_scale", -1e9),
        *(("info.guidance", value) for value in (3, "text", [1, 4], {"text": 3}, {"text": "14"}, {"text": [4, 1]},
                                                 {"text": [1]}, {"text": [0, "x"]}, {"text": None})),
        *(("info.task_options", value) for value in (3, "x", [1])),
        ("info.recipe", "x"), ("info.task", 3), ("info.family", ["x"]), ("info.colour", 1), ("info", [3]),
    ],
)  # fmt: skip
def test_config_values_out_of_range_are_refused(key, value, adapter_folder, tmp_path):
    bad = shutil.copytree(adapter_folder, tmp_path / "bad")
    values = json.loads((bad / "config.json").read_text())
    group, _, name = key.rpartition(".")
    (values[group] if group else values)[name] = value
    (bad / "config.json").write_text(json.dumps(values))
    refused(lambda: load_adapter(bad, "upscale", None, UNET), str(bad), "not an adapter's config")


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
    features = text.embed_prompts(loaded.text, CAPTIONS)[0]
    assert torch.equal(features, text.embed_prompts(BACKBONE.text, CAPTIONS)[0])
    frozen = loaded.freeze().to("cpu", torch.float64)
    assert frozen.unet.dtype == torch.float64 and not any(p.requires_grad for p in frozen.unet.parameters())


def test_folders_without_a_backbone_are_refused(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", "no-such-model"):
        refused(lambda name=name: load_backbone(name), str(name), "no model there")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(("change", "message"), [(nan, "NaN"), (truncate, "loaded"), (pickled, "not as safetensors")])
def test_broken_backbone_weights_are_refused(part, change, message, checkpoint_folder, tmp_path):
    weights = next((checkpoint_folder / part).glob("*.safetensors")).relative_to(checkpoint_folder)
    bad = broken(checkpoint_folder, tmp_path / "bad", str(weights), change)
    refused(lambda: load_backbone(bad), str(bad), message)


def pickled_everywhere(folder: Path) -> Path:
    for weights in list(folder.rglob("*.safetensors")):
        pickled(weights)
    return folder


def test_pickled_weights_are_converted_by_the_command_in_the_message(checkpoint_folder, tmp_path):
    old = pickled_everywhere(shutil.copytree(checkpoint_folder, tmp_path / "old"))
    message = refused(lambda: load_backbone(old), "DiffusionPipeline.from_pretrained(MODEL, use_safetensors=False)")
    code = message.partition("with diffusers: ")[2].replace("MODEL", "old").replace("NEW", "new")
    exec(code, {"DiffusionPipeline": DiffusionPipeline, "old": old, "new": tmp_path / "new"})
    assert digest(load_backbone(tmp_path / "new").unet) == digest(UNET)
    refused(lambda: load_vae(old), "vae", "not as safetensors")
    refused(lambda: open_vae(old / "vae"), "vae", "not as safetensors")
    assert load_backbone(checkpoint_folder).unet  # .bin files beside safetensors are ignored
    for weights in list(checkpoint_folder.rglob("*.safetensors")):
        shutil.copy(weights, tmp_path / "new" / weights.parent.name / weights.with_suffix(".bin").name)
    load_backbone(tmp_path / "new")


UNUSED = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "tiny_vae": ["diffusers", "AutoencoderTiny"],
}


@pytest.mark.parametrize("names", [[name] for name in UNUSED] + [list(UNUSED)])
@pytest.mark.parametrize("present", [False, True])
def test_unused_parts_may_be_absent_or_broken(checkpoint_folder, names, present, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **{name: UNUSED[name] for name in names}}))
    for name in names if present else []:
        (folder / name).mkdir()
        torch.save({}, folder / name / "pytorch_model.bin")
    assert digest(load_backbone(folder).unet) == digest(UNET)


@pytest.mark.parametrize("value", ["a" * 5_000, "", [], {"a": 1}])
def test_an_invalid_tokenizer_length_is_refused(checkpoint_folder, value, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": value}))
    refused(lambda: load_backbone(folder), str(folder))


def test_a_backbone_s_missing_weight_is_named(checkpoint_folder, tmp_path):
    bad = broken(checkpoint_folder, tmp_path / "bad", "unet/diffusion_pytorch_model.safetensors", drop)
    refused(lambda: load_backbone(bad), str(bad), "is missing")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.safetensors"])
def test_single_files_that_are_not_safetensors_are_refused(name, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / name)
    refused(lambda: load_backbone(tmp_path / name), name)
