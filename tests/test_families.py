"""The transformer families: equal to the stock pipeline without an adapter, neutral with an untrained one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from codi import CoDiPipeline
from codi.models import codec
from codi.models.adapter import FORMS
from codi.models.backbones import family_of
from codi.models.lora import add_lora
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.models.tiny import new_tiny
from codi.sampling.sampler import initial_noise
from families import FAMILIES, stock_sigmas
from tiny import rand, randn

SIDE = 16  # px
PROMPT = "a red ball on a plain floor"
CLASSIFIER_FREE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"guidance_scale": 1.0}),
    ({"guidance_scale": 3.0, "negative_prompt": "blue box"},) * 2,
]
SIDES = {"sana": 32, "sana15": 32}  # the stock pipeline needs multiples of 32
STOCK: dict[str, dict[str, Any]] = {name: {"use_resolution_binning": False} for name in ("sana", "sana15")}
# Pairs of arguments for CoDiPipeline and the stock pipeline: without guidance, and with each kind the family has.
GUIDED: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "flux2": [({}, {"guidance_scale": 1.0}), ({"guidance_scale": 4.0}, {"guidance_scale": 4.0})],
    "qwenimage": [
        ({}, {"true_cfg_scale": 1.0}),
        ({"guidance_scale": 4.0, "negative_prompt": "box"}, {"true_cfg_scale": 4.0, "negative_prompt": "box"}),
    ],
    "flux2dev": [({}, {"guidance_scale": 4.0}), ({"embedded_guidance": 7.0}, {"guidance_scale": 7.0})],
    "sd3": CLASSIFIER_FREE,
    "sd35": CLASSIFIER_FREE,
    "sana": CLASSIFIER_FREE,
    "sana15": CLASSIFIER_FREE,
    "flux": [
        ({}, {"guidance_scale": 3.5}),
        ({"embedded_guidance": 7.0}, {"guidance_scale": 7.0}),
        ({"guidance_scale": 3.0, "negative_prompt": "blue"}, {"true_cfg_scale": 3.0, "negative_prompt": "blue"}),
    ],
    "zimage": [  # the stock pipeline's scale starts at 0: see ZImage.guide
        ({}, {"guidance_scale": 0.0}),
        ({"guidance_scale": 3.0, "negative_prompt": "blue"}, {"guidance_scale": 2.0, "negative_prompt": "blue"}),
    ],
}
CASES = [(family, *pair) for family, pairs in GUIDED.items() for pair in pairs]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> str:
    return request.param


def without_progress_bar(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(backbone: Any, prompts: list[str]) -> tuple[Tensor, Any]:
    """Return the text features and added tensors of the prompts."""
    text, added = embed_prompts(backbone.text, prompts, (SIDE, SIDE))
    return text, added


def noise_for(backbone: Any, seed: int, side: int = SIDE) -> Tensor:
    cells = side // codec.downscale(backbone.vae)
    return initial_noise((codec.channels(backbone.vae), cells, cells), [seed])


def pictures(name: str, ours: dict[str, Any], theirs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Return the images of CoDiPipeline without an adapter and of the stock pipeline, for the same noise and sigmas."""
    backbone = FAMILIES[name]().freeze()
    stock, pipe = without_progress_bar(backbone.pipeline()), without_progress_bar(CoDiPipeline(**vars(backbone)))
    side = SIDES.get(name, SIDE)
    latents = backbone.kind.to_stock(noise_for(backbone, 3, side))
    expected = stock(
        prompt=PROMPT, height=side, width=side, num_inference_steps=steps, sigmas=stock_sigmas(steps), latents=latents,
        output_type="pt", **theirs, **STOCK.get(name, {}),
    ).images  # fmt: skip
    images = pipe(prompt=PROMPT, height=side, width=side, steps=steps, seed=3, output_type="pt", **ours).images
    return images, expected.clamp(0, 1)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(("name", "ours", "theirs"), CASES)
def test_pipeline_without_an_adapter_equals_the_stock_pipeline(name, ours, theirs, steps):
    images, expected = pictures(name, ours, theirs, steps)
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", list(FORMS))
def test_untrained_adapters_are_exactly_neutral(family, form):
    """The output equals the backbone's; with changed weights it differs, and at strength 0 it is equal again."""
    backbone = FAMILIES[family]().freeze()
    z, time = randn(2, *noise_for(backbone, 0).shape[1:]), torch.tensor([300.0, 800.0])
    text, added = embed_prompts(backbone.text, [PROMPT, "blue box"], (SIDE, SIDE))
    expected = Student(backbone.network)(z, time, Conditioning(text, added=added))
    try:
        adapter = FORMS[form].from_backbone(backbone.network, backbone.vae, 3, guidance_scales=1, target_time=True)
    except Exception as error:
        assert form == "controlnet" and "has no ControlNet" in str(error)
        return
    condition = adapter.read(rand(2, 3, SIDE, SIDE), backbone.vae)
    inputs: dict[str, Any] = {"guidance": torch.tensor([[2.0], [3.0]]), "jump": torch.tensor([[0.5, 0.15], [1.0, 0.8]])}
    conditioning = Conditioning(text, condition, added=added, **inputs)
    student = Student(backbone.network, adapter)
    assert torch.equal(student(z, time, conditioning), expected)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():  # zero-initialized, hence neutral
                parameter.add_(0.1)
    assert not torch.equal(student(z, time, conditioning), expected)
    assert torch.equal(student(z, time, conditioning, strength=0.0), expected)


@pytest.mark.parametrize("limit", [VERY_LARGE_INTEGER, 2000])
def test_tokenizer_without_a_length_limit_uses_the_text_encoders(family, limit):
    """The limit is unset if `model_max_length` or tokenizer_config.json is missing."""
    backbone = FAMILIES[family]().freeze()
    parts = vars(backbone)
    tokenizers = {name: copy.deepcopy(part) for name, part in parts.items() if name.startswith("tokenizer") and part}
    for tokenizer in tokenizers.values():
        tokenizer.model_max_length = limit
    unlimited = type(backbone)(**{**parts, **tokenizers})
    expected = backbone.text.encode([PROMPT, ""])
    for text in (unlimited.text, CoDiPipeline(**vars(unlimited)).text):
        for key, value in text.encode([PROMPT, ""]).items():
            assert torch.equal(value, expected[key])


def test_predictions_do_not_depend_on_other_prompts_in_the_batch(family):
    """A short and a long prompt in one batch give the predictions of each alone."""
    backbone = FAMILIES[family]().freeze()
    prompts = ["blue box", f"{PROMPT} and a green cone at dusk"]
    z, time = randn(2, *noise_for(backbone, 0).shape[1:]), torch.tensor([300.0, 800.0])
    text, added = conditions(backbone, prompts)
    together = Student(backbone.network)(z, time, Conditioning(text, added=added))
    for row, prompt in enumerate(prompts):
        text, added = conditions(backbone, [prompt])
        alone = Student(backbone.network)(z[row : row + 1], time[row : row + 1], Conditioning(text, added=added))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["fused", "lora"])
def test_gradient_checkpointing_changes_nothing(family, form):
    """Loss and gradients stay the same, for an encoder and for low-rank updates."""
    results = []
    for checkpointing in (False, True):
        backbone = FAMILIES[family]().freeze()
        text, added = conditions(backbone, [PROMPT, "blue box"])
        adapter, network = FORMS[form].from_backbone(backbone.network, backbone.vae), backbone.network
        if form == "lora":
            network = add_lora(network, 2, "generate")
        for part in (network, getattr(adapter, "encoder", None)) if checkpointing else ():
            if part is not None:
                part.enable_gradient_checkpointing()
        for parameter in (*getattr(adapter, "mu", ()), *(p for n, p in network.named_parameters() if "lora_B" in n)):
            torch.nn.init.constant_(parameter, 0.05)
        student = Student(network, adapter).train()
        z, time = randn(2, *noise_for(backbone, 0).shape[1:]), torch.tensor([300.0, 800.0])
        condition = adapter.read(rand(2, 3, SIDE, SIDE), backbone.vae)
        loss = student(z, time, Conditioning(text, condition, added=added)).square().mean()
        loss.backward()
        results.append((loss, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    (expected_loss, gradients), (loss, other_gradients) = results
    assert torch.equal(loss, expected_loss) and gradients.keys() == other_gradients.keys() and len(gradients) > 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_every_block_has_low_rank_updates(family):
    network = add_lora(FAMILIES[family]().network, 2, "generate")
    for block in family_of(network).blocks(network):
        assert any("lora_B" in name for name, _ in block.named_parameters())


def test_fused_adapter_takes_a_fourth_condition_channel(family):
    backbone = FAMILIES[family]().freeze()
    adapter = FORMS["fused"].from_backbone(backbone.network, backbone.vae, 4)
    condition = adapter.read(rand(2, 4, SIDE, SIDE), backbone.vae)
    text, added = conditions(backbone, [PROMPT, "blue box"])
    features = adapter.prepare(condition, text, added)
    assert [feature.shape[-1] for feature in features] == [len(mu) for mu in adapter.mu]
    assert all(feature.isfinite().all() for feature in features)


def test_networks_predict_in_bfloat16_and_on_the_meta_device(family):
    backbone = FAMILIES[family]().freeze()
    z, time = randn(2, *noise_for(backbone, 0).shape[1:]), torch.tensor([300.0, 800.0])
    text, added = conditions(backbone, [PROMPT, "blue box"])
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in (added or {}).items()}
    kind, network = backbone.kind, backbone.network
    prediction = kind.predict(network.to(torch.bfloat16), z.bfloat16(), time, text.bfloat16(), half)
    assert prediction.dtype == torch.bfloat16 and prediction.shape == z.shape and prediction.isfinite().all()
    shapes = kind.condition_shapes(network.config)
    meta_inputs = {name: torch.zeros(2, *shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        meta_network = type(network).from_config(network.config)
    prediction = kind.predict(
        meta_network, z.to("meta"), time.to("meta"), meta_inputs.pop("features"), meta_inputs or None
    )
    assert prediction.is_meta and prediction.shape == z.shape


def test_tiny_decoder_fits_the_latents(family):
    backbone = FAMILIES[family]()
    blocks = (0,) * codec.downscale(backbone.vae).bit_length()
    tiny = new_tiny(backbone.vae, 4, blocks)
    assert codec.decode(tiny, noise_for(backbone, 0)).shape == (1, 3, SIDE, SIDE)
