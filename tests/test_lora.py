"""Low-rank updates: no effect before training, an unchanged backbone, and files that diffusers reads."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codi import CoDiPipeline
from codi.models.adapter import FORMS
from codi.models.adapter_files import find_adapter, load_adapter
from codi.models.backbones import EMBEDDED, load_backbone
from codi.models.backbones.stable_diffusion import StableDiffusion
from codi.models.lora import (
    FILE,
    add_lora,
    join_lora,
    load_lora,
    lora_names,
    merge_lora,
    save_lora,
    scale_lora,
    shared_copy,
    without_lora,
)
from codi.models.student import Conditioning, Student
from codi.training.saving import save_adapter
from tiny import DOWNSCALE, LATENT_CHANNELS, TEXT_WIDTH, rand, randn, tiny_backbone, tiny_lora, tiny_unet, tiny_vae

UNET, VAE = tiny_unet().requires_grad_(False), tiny_vae()
WORDS, Z = randn(2, 5, TEXT_WIDTH, seed=7), randn(2, LATENT_CHANNELS, 8, 8)
LEVELS = torch.tensor([3, 800])


def predicted(unet: UNet2DConditionModel, weight: float | None = None) -> Tensor:
    if weight is not None:
        scale_lora(unet, {name: weight for name in lora_names(unet)})
    with torch.no_grad():
        return unet(Z, LEVELS, WORDS).sample


EXPECTED = predicted(UNET)


def conditioning(adapter) -> Conditioning:
    with torch.no_grad():
        return Conditioning(WORDS, adapter.read(rand(2, 3, 8 * DOWNSCALE, 8 * DOWNSCALE, seed=1), VAE))


def test_before_training_nothing_changes_and_everything_is_shared():
    before = {name: value.clone() for name, value in UNET.state_dict().items()}
    adapted = add_lora(UNET, 2, "depth")
    assert torch.equal(predicted(adapted), EXPECTED)
    shared, mine = {id(p) for p in UNET.parameters()}, dict(adapted.named_parameters())
    assert {id(p) for name, p in mine.items() if "lora_" not in name} == shared
    added = {name for name, p in mine.items() if id(p) not in shared}
    assert added and all(".lora_A.depth." in name or ".lora_B.depth." in name for name in added)
    assert {name for name, p in mine.items() if p.requires_grad} == added
    # The backbone is unchanged: the same modules, the same bytes, no updates.
    assert lora_names(UNET) == [] and not any("lora" in name for name, _ in UNET.named_modules())
    assert all(torch.equal(before[name], value) for name, value in UNET.state_dict().items())
    assert lora_names(adapted) == ["depth"]


def test_the_initial_updates_depend_only_on_their_seed():
    state = torch.get_rng_state()
    first, again, reseeded = (dict(add_lora(UNET, 2, "depth", seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], reseeded[name]) for name in first)


def test_training_changes_only_the_updates():
    before = {name: value.clone() for name, value in UNET.state_dict().items()}
    adapted = add_lora(UNET, 2, "depth")
    start = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):  # A has no gradient while B is 0
        optimizer.zero_grad()
        adapted(Z, LEVELS, WORDS).sample.square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(start[name], p) for name, p in adapted.named_parameters() if p.requires_grad)
    assert all(torch.equal(before[name], value) for name, value in UNET.state_dict().items())
    assert torch.equal(predicted(UNET), EXPECTED) and not torch.equal(predicted(adapted), EXPECTED)


def test_weight_0_is_the_backbone_and_larger_weights_have_more_influence():
    adapted = tiny_lora(UNET)
    full = predicted(adapted)
    away = [float((predicted(adapted, weight) - EXPECTED).norm()) for weight in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert away[0] == 0 and all(b > a for a, b in zip(away, away[1:], strict=False))
    assert torch.equal(predicted(adapted, 0.0), EXPECTED) and torch.equal(predicted(adapted, 1.0), full)
    scale_lora(adapted, {"nobody": 0.5})  # names of other adapters are ignored
    assert torch.equal(predicted(adapted), full)


def test_scaling_keeps_the_trainable_flags():
    for trains in (False, True):
        adapted = add_lora(UNET, 2, "depth")
        for name, p in adapted.named_parameters():
            p.requires_grad_(trains and "lora_" in name)
        before = {name: p.requires_grad for name, p in adapted.named_parameters()}
        predicted(adapted, 0.5)
        assert {name: p.requires_grad for name, p in adapted.named_parameters()} == before


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_saved_updates_load_here_and_in_stock_diffusers(half, tmp_path):
    adapted = tiny_lora(UNET, "depth")
    save_lora(adapted, tmp_path, "depth", half)
    stored = load_file(tmp_path / FILE)
    assert stored and all(value.dtype == (torch.float16 if half else torch.float32) for value in stored.values())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    loaded = load_lora(UNET, tmp_path, "anything")
    assert lora_names(loaded) == ["anything"] and not any(p.requires_grad for p in loaded.parameters())
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert {id(p) for p in UNET.parameters()} <= {id(p) for p in loaded.parameters()}
    stock = tiny_unet()  # a separate U-Net, without our code
    stock.load_lora_adapter(tmp_path, adapter_name="stock", weight_name=FILE, prefix="unet")
    for output in (predicted(loaded), predicted(stock)):
        if half:
            torch.testing.assert_close(output, predicted(adapted), rtol=0, atol=2e-3)
        else:
            assert torch.equal(output, predicted(adapted))
    assert torch.equal(predicted(loaded), predicted(stock)) and torch.equal(predicted(UNET), EXPECTED)


def test_equal_updates_are_saved_as_equal_bytes(tmp_path):
    adapted = tiny_lora(UNET, "depth")
    for i in range(6):
        save_lora(adapted, tmp_path / str(i), "depth", half=i % 2 == 1)
    for parity in (0, 1):
        assert len({(tmp_path / str(i) / FILE).read_bytes() for i in range(parity, 6, 2)}) == 1
    with safe_open(tmp_path / "0" / FILE, "pt") as file:
        (notes,) = file.metadata().values()  # several keys would be written in random order
    assert (
        json.loads(notes)["unet.target_modules"] == StableDiffusion.lora_targets
    )  # a list: the sets of peft would be in random order too


def test_updates_fit_a_fine_tune_of_the_backbone(tmp_path):
    """The same updates change a fine-tune in a similar direction, and at weight 0 it is exactly itself."""
    save_lora(tiny_lora(UNET), tmp_path, "generate")
    tuned = shared_copy(UNET)
    tuned.load_state_dict({k: v + 0.005 * randn(*v.shape, seed=3) for k, v in UNET.state_dict().items()}, assign=True)
    assert torch.equal(predicted(UNET), EXPECTED)
    expected = predicted(tuned)
    loaded = load_lora(tuned, tmp_path, "generate")
    moved, original = predicted(loaded) - expected, predicted(load_lora(UNET, tmp_path, "generate")) - EXPECTED
    assert torch.equal(predicted(loaded, 0.0), expected) and not torch.equal(expected, EXPECTED)
    assert torch.cosine_similarity(moved.flatten(), original.flatten(), dim=0) > 0.8


def test_updates_of_several_adapters_are_joined():
    joined = join_lora(UNET, {"a": tiny_lora(UNET, "depth"), "nothing": UNET, "b": tiny_lora(UNET, "x", seed=1)})
    assert lora_names(joined) == ["a", "b"] and lora_names(UNET) == []
    scale_lora(joined, {"a": 1.0, "b": 0.0})
    torch.testing.assert_close(predicted(joined), predicted(tiny_lora(UNET, "depth")))
    assert torch.equal(predicted(join_lora(UNET, {"nothing": UNET})), EXPECTED)


def test_an_incomplete_update_is_refused(tmp_path):
    save_lora(tiny_lora(UNET, "depth"), tmp_path, "depth")
    weights = load_file(tmp_path / FILE)
    gone = next(key for key in weights if "lora_B" in key)
    del weights[gone]
    save_file(weights, tmp_path / FILE)
    with pytest.raises(ValueError, match=f"{gone!r} is missing"):
        load_lora(UNET, tmp_path, "depth")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_carries_updates_through_its_folder(form, tmp_path):
    adapter = FORMS[form].from_backbone(UNET, VAE)
    adapter.register_to_config(info={"task": "depth"})
    adapted = tiny_lora(UNET, "depth")
    save_adapter(tmp_path, adapter, adapted, full=False, half=False)
    assert not (tmp_path / "unet").exists()
    loaded, unet = load_adapter(tmp_path, "depth", None, UNET)
    assert unet is not UNET and lora_names(unet) == ["depth"]
    with torch.no_grad():
        student, c = Student(unet, loaded), conditioning(loaded)
        assert torch.equal(student(Z, LEVELS, c), predicted(adapted))
        assert torch.equal(student(Z, LEVELS, c, 0.0), EXPECTED)
        assert torch.equal(student(Z, LEVELS, Conditioning(WORDS)), EXPECTED)  # no condition: no adapter
        half = (student(Z, LEVELS, c, 0.5) - EXPECTED).norm()
        assert 0 < half < (student(Z, LEVELS, c) - EXPECTED).norm()
    # Another adapter saved into the folder without updates leaves none behind.
    save_adapter(tmp_path, adapter, UNET, full=False, half=False)
    assert load_adapter(tmp_path, "depth", None, UNET)[1] is UNET


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_gives_the_same_gradients(form):
    adapter = FORMS[form].from_backbone(UNET, VAE)
    plain = Student(tiny_lora(UNET), adapter).train()
    for name, p in plain.network.named_parameters():
        p.requires_grad_("lora_" in name)
    saving = copy.deepcopy(plain)
    saving.network.enable_gradient_checkpointing()
    gradients = []
    for student in (plain, saving):
        student(Z, LEVELS, conditioning(adapter)).square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if "lora_" in name})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_merged_updates_give_the_same_output_and_keep_the_backbone():
    joined = join_lora(UNET, {"a": tiny_lora(UNET, "depth"), "b": tiny_lora(UNET, "x", seed=1)})
    scale_lora(joined, {"a": 0.5, "b": 2.0})
    merged = merge_lora(joined)
    torch.testing.assert_close(predicted(merged), predicted(joined))
    assert torch.equal(predicted(UNET), EXPECTED) and lora_names(merged) == [] != lora_names(joined)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in UNET.named_parameters()}
    shared, own = {id(p) for p in UNET.parameters()}, {name for name, _ in joined.named_modules() if "lora_A" in name}
    updated = {name.split(".lora_A")[0] + ".weight" for name in own}
    assert {name for name, p in merged.named_parameters() if id(p) not in shared} >= updated
    assert merged.conv_in.weight is UNET.conv_in.weight


def test_updates_of_different_layers_can_be_merged():
    few = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, use_dora=True)
    joined = join_lora(UNET, {"all": tiny_lora(UNET, "depth")})
    joined.add_adapter(few, adapter_name="few")
    joined.set_adapters(["all", "few"])
    torch.testing.assert_close(predicted(merge_lora(joined)), predicted(joined), rtol=1e-4, atol=1e-5)
    assert torch.equal(predicted(without_lora(joined)), EXPECTED)


def test_the_stock_pipeline_reads_every_shipped_file():
    """Without the prefix of the network it would silently load nothing."""
    files = sorted(EMBEDDED.rglob(FILE))
    assert len(files) > 7
    for file in files:
        with safe_open(file, "pt") as weights:
            notes = json.loads(weights.metadata()["lora_adapter_metadata"])
            assert all(key.startswith("unet.") for key in [*weights.keys(), *notes]), file
    backbone = load_backbone("mini")
    stock = backbone.pipeline()
    channels, width = (backbone.unet.config[name] for name in ("in_channels", "cross_attention_dim"))
    inputs = (randn(1, channels, 8, 8), LEVELS[1:], randn(1, 5, width))
    _, ours = load_adapter("generate", "generate", None, backbone.unet)
    with torch.no_grad():
        plain, expected = backbone.unet(*inputs).sample, ours(*inputs).sample
        stock.load_lora_weights(find_adapter("generate"))
        output = stock.unet(*inputs).sample
    assert (output - plain).abs().max() > 1e-3 and (output - expected).abs().max() < 1e-6


def test_the_stock_pipeline_reads_the_updates_of_a_saved_pipeline(tmp_path):
    """Including those of an old file, whose keys lack the network's name, which stock pipelines silently ignore."""
    adapter = FORMS["lora"].from_backbone(UNET, VAE)
    adapter.register_to_config(info={"task": "generate"})
    save_adapter(tmp_path / "old", adapter, tiny_lora(UNET), full=False, half=False)
    old = tmp_path / "old" / FILE
    with safe_open(old, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    note = json.dumps({key.removeprefix("unet."): value for key, value in settings.items()})
    weights = {key.removeprefix("unet."): value for key, value in load_file(old).items()}
    save_file(weights, old, {"lora_adapter_metadata": note, "format": "pt"})
    config = json.loads((old.parent / "config.json").read_text())
    config["info"].pop("files", None)  # old adapters have no list of files
    (old.parent / "config.json").write_text(json.dumps(config))
    before = old.read_bytes()
    pipe = CoDiPipeline(**vars(tiny_backbone()))
    pipe.load_adapter(tmp_path / "old")
    pipe.save_pretrained(tmp_path / "saved")
    assert old.read_bytes() == before  # the user's own file is unchanged
    stock = tiny_backbone().pipeline()
    stock.load_lora_weights(tmp_path / "saved" / "adapters" / "old", weight_name=FILE)
    expected = predicted(load_adapter(tmp_path / "old", "generate", None, UNET)[1])
    assert not torch.equal(expected, EXPECTED)
    torch.testing.assert_close(predicted(stock.unet), expected)
    again = CoDiPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(predicted(again.student.network), expected)
