"""Users' LoRAs, loaded here or by a stock pipeline: listed, set and removed, whichever parts they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from codi.errors import UserError
from codi.models.lora import FILE, lora_names, save_lora, shared_copy
from codi.sampling.pipeline import CoDiPipeline
from pipelines import run
from shell import make_adapter
from tiny import randn, tiny_backbone, tiny_lora, tiny_unet

BLANK = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PARTS = {"unet": ["unet"], "text_encoder": ["text_encoder"], "both": ["unet", "text_encoder"]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "generate", "generate")


def stock_pipeline() -> Any:
    parts = {k: v for k, v in vars(tiny_backbone()).items() if k in ("vae", "scheduler", "unet") or k.endswith("r")}
    parts = {k: v for k, v in parts.items() if v is not None}
    stock: Any = StableDiffusionPipeline(**parts, **BLANK)
    stock.set_progress_bar_config(disable=True)
    return stock


def without_progress(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_run(stock: Any) -> Tensor:
    """Return the image that `own_run` generates without an adapter, from a stock pipeline."""
    noise = randn(1, 4, 8, 8, seed=7)
    return stock(prompt="a red ball", num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt").images


def own_run(pipe: Any) -> Tensor:
    return run(pipe, latents=randn(1, 4, 8, 8, seed=7), guidance_scale=1.0)


def lora(folder: Path, parts: list[str], seed: int = 3) -> str:
    """Write a LoRA for these parts of the tiny pipeline."""
    layers: dict[str, Any] = {}
    if "unet" in parts:
        save_lora(tiny_lora(tiny_unet(), "x", seed), folder, "x")
        stored = load_file(folder / FILE)
        layers["unet_lora_layers"] = {key.removeprefix("unet."): value for key, value in stored.items()}
    if "text_encoder" in parts:
        encoder: Any = tiny_backbone().text_encoder
        encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        state = get_peft_model_state_dict(encoder)
        layers["text_encoder_lora_layers"] = {k: 3 * randn(*v.shape, seed=seed) for k, v in state.items()}
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return str(folder)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_loras_of_a_stock_pipeline_are_recognized(parts, adapter, tmp_path):
    stock = stock_pipeline()
    plain = stock_run(stock)
    stock.load_lora_weights(lora(tmp_path / "lora", parts), adapter_name="style")
    stock.set_adapters("style", 0.7)
    styled = stock_run(stock)
    assert not torch.allclose(styled, plain, atol=1e-3)
    for pipe in (
        without_progress(CoDiPipeline.from_pipe(stock)),
        without_progress(CoDiPipeline(**vars(CoDiPipeline.from_pipe(stock).parts))),
    ):
        torch.testing.assert_close(own_run(pipe), styled, rtol=0, atol=1e-4)
        assert pipe.get_active_adapters() == ["style"]
        assert pipe.get_list_adapters() == {part: ["style"] for part in sorted(parts, reverse=True)}
    pipe = without_progress(CoDiPipeline.from_pipe(stock))
    pipe.load_adapter(adapter)
    adapted = own_run(pipe)
    pipe.disable_lora()
    assert pipe.get_active_adapters() == ["generate"] and not torch.allclose(own_run(pipe), adapted, atol=1e-3)
    torch.testing.assert_close(run_without_adapter(pipe), plain, rtol=0, atol=1e-4)
    pipe.enable_lora()
    assert torch.equal(own_run(pipe), adapted)  # with the earlier weight
    pipe.set_adapters(["style"], 0.0)
    torch.testing.assert_close(run_without_adapter(pipe), plain, rtol=0, atol=1e-4)
    with pytest.warns(UserWarning, match="the LoRA style is not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    saved = without_progress(CoDiPipeline.from_pretrained(tmp_path / "saved"))
    assert saved.get_list_adapters() == {"codi": ["generate"]}
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"codi": ["generate"]}
    torch.testing.assert_close(own_run(saved), own_run(pipe), rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_run(stock), plain, rtol=0, atol=1e-6)


def run_without_adapter(pipe: Any) -> Tensor:
    return run(pipe, latents=randn(1, 4, 8, 8, seed=7), guidance_scale=1.0, strength=0)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_loras_of_any_parts_are_loaded_and_deleted_one_by_one(parts, tmp_path):
    pipe = without_progress(CoDiPipeline(**vars(tiny_backbone())))
    plain = own_run(pipe)
    pipe.load_lora_weights(lora(tmp_path / "one", parts))
    with_one = own_run(pipe)
    pipe.load_lora_weights(lora(tmp_path / "two", parts, seed=4))
    with_both = own_run(pipe)
    assert pipe.get_active_adapters() == ["default_0", "default_1"]
    pipe.set_adapters("default_0")
    assert torch.equal(own_run(pipe), with_one) and not torch.allclose(with_one, plain, atol=1e-3)
    pipe.set_adapters(["default_1", "default_0"])
    torch.testing.assert_close(own_run(pipe), with_both, rtol=0, atol=1e-5)
    assert not torch.allclose(with_both, with_one, atol=1e-3)
    pipe.delete_adapters("default_1")
    assert torch.equal(own_run(pipe), with_one) and pipe.get_active_adapters() == ["default_0"]
    with pytest.raises(UserError, match="default_1: no such LoRA loaded: use default_0"):
        pipe.delete_adapters("default_1")
    pipe.unload_lora_weights()
    assert torch.equal(own_run(pipe), plain) and pipe.get_list_adapters() == {}


def test_changes_through_a_stock_pipeline_on_shared_parts_take_effect(adapter, tmp_path):
    """Each layer keeps its own weight, as a stock pipeline can set it."""
    stock = stock_pipeline()
    pipe = without_progress(CoDiPipeline.from_pipe(stock))
    pipe.load_adapter(adapter)
    plain = own_run(pipe)
    stock.load_lora_weights(lora(tmp_path / "lora", ["unet"]), adapter_name="style")
    styled = own_run(pipe)
    assert pipe.get_active_adapters() == ["generate", "style"]
    stock.set_adapters("style", {"unet": {"down": 0.3, "mid": 1.0, "up": 0.0}})
    assert not any(torch.allclose(own_run(pipe), image, atol=1e-3) for image in (plain, styled))
    expected = shared_copy(stock.unet)  # with peft alone: the adapter's updates beside the LoRA
    expected.load_lora_adapter(adapter, adapter_name="own", weight_name=FILE, prefix="unet")
    for layer in expected.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(["style", "own"])  # type: ignore[operator]
    inputs = (randn(1, 4, 8, 8), torch.tensor([500]), randn(1, 5, expected.config["cross_attention_dim"]))
    with torch.no_grad():
        output, expected_output = (unet(*inputs).sample for unet in (pipe.student.network, expected))
    torch.testing.assert_close(output, expected_output)
    stock.disable_lora()
    torch.testing.assert_close(own_run(pipe), plain, rtol=0, atol=1e-5)
    stock.enable_lora()
    stock.set_adapters("style")
    torch.testing.assert_close(own_run(pipe), styled, rtol=0, atol=1e-5)
    stock.unload_lora_weights()
    assert torch.equal(own_run(pipe), plain) and pipe.get_active_adapters() == ["generate"]


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_fused_loras_are_refused_until_they_are_unloaded(parts, adapter, tmp_path):
    stock = stock_pipeline()
    stock.load_lora_weights(lora(tmp_path / "lora", parts), adapter_name="style")
    styled = stock_run(stock)
    stock.fuse_lora()
    with pytest.raises(UserError, match="^LoRA style: is fused into the weights of a [^\n]+ call unload_lora_weights"):
        CoDiPipeline.from_pipe(stock)
    stock.unload_lora_weights()
    pipe = without_progress(CoDiPipeline.from_pipe(stock))
    torch.testing.assert_close(own_run(pipe), styled, rtol=0, atol=1e-4)
    assert pipe.get_list_adapters() == {} and pipe.load_adapter(adapter) == "generate"


def test_a_lora_that_fails_while_loading_leaves_no_trace(tmp_path):
    pipe = without_progress(CoDiPipeline(**vars(tiny_backbone())))
    plain, file = own_run(pipe), Path(lora(tmp_path / "lora", PARTS["both"])) / FILE
    weights = load_file(file)
    wrong = {k: torch.zeros(2, 3) if k.startswith("text_encoder") and "lora_A" in k else v for k, v in weights.items()}
    save_file(wrong, file, {"format": "pt"})
    with pytest.raises(UserError, match="not a LoRA for this model"):
        pipe.load_lora_weights(str(file.parent), adapter_name="style")
    assert torch.equal(own_run(pipe), plain) and pipe.get_active_adapters() == []
    assert lora_names(pipe.unet) == lora_names(pipe.text_encoder) == []
    save_file(weights, file, {"format": "pt"})
    pipe.load_lora_weights(str(file.parent), adapter_name="style")
    assert pipe.get_active_adapters() == ["style"] and not torch.allclose(own_run(pipe), plain, atol=1e-3)


def test_loras_and_adapters_may_not_share_a_name(adapter, tmp_path):
    stock = stock_pipeline()
    stock.load_lora_weights(lora(tmp_path / "lora", ["unet"]), adapter_name="generate")
    pipe = CoDiPipeline.from_pipe(stock)
    with pytest.raises(UserError, match="a LoRA is called 'generate'"):
        pipe.load_adapter(adapter, as_="mine")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(tmp_path / "text", ["text_encoder"]), adapter_name="style")
    with pytest.raises(UserError, match="a LoRA is called 'style'"):
        pipe.load_adapter(adapter, as_="style")
    assert pipe.load_adapter(adapter, as_="mine") == "mine"
    with pytest.raises(UserError, match="'mine': is taken"):
        pipe.load_lora_weights(str(tmp_path / "lora"), adapter_name="mine")


def test_a_lora_scale_applies_to_fused_loras_too(adapter, tmp_path):
    pipe = without_progress(CoDiPipeline(**vars(tiny_backbone())))
    pipe.load_adapter(adapter)
    pipe.load_lora_weights(lora(tmp_path / "lora", ["unet"]), adapter_name="style")
    plain = {scale: run(pipe, cross_attention_kwargs={"scale": scale}) for scale in (1.0, 0.5)}
    pipe.fuse_lora()
    for scale, expected in plain.items():
        image = run(pipe, cross_attention_kwargs={"scale": scale})
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(plain[1.0], plain[0.5], atol=1e-3)
    pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(run(pipe), plain[0.5], rtol=0, atol=1e-4)
