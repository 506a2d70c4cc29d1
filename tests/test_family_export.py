"""Export of the transformer families: stock pipelines produce codi's images from an exported adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from safetensors.torch import load_file
from torch import Tensor

from codi import CoDiPipeline
from codi.errors import UserError
from codi.export.diffusers import export_diffusers
from codi.export.flow_scheduler import make_flow_scheduler
from codi.export.ldm import export_ldm
from codi.export.onnx import export_onnx
from codi.export.source import Source, load_source
from codi.models.adapter import FORMS
from codi.models.backbones import FAMILIES as KINDS
from codi.models.backbones.flux import pack
from codi.models.lora import FILE, add_lora
from codi.tasks import get_task
from codi.training.saving import save_adapter
from families import FAMILIES
from tiny import rand, randn

TOLERANCE = 1e-4  # of images in [0, 1], float32
SIDE = 32  # px
GUIDED = {"guidance": {"text": [1, 5]}, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """A function that returns the folder of a family's tiny model."""
    root = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        if not (root / name).exists():
            FAMILIES[name]().pipeline().save_pretrained(root / name)
        return root / name

    return model


@pytest.fixture(autouse=True)
def cards(monkeypatch):
    """Restore the method that model cards replace."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.sample)


def make(folder: Path, name: str, form: str, task: str = "canny", full: bool = False, **info: Any) -> Path:
    """Save an adapter of a tiny model with all weights nonzero, as after training."""
    backbone, task_object = FAMILIES[name]().freeze(), get_task(task)
    scales, channels = len(info.get("guidance", ())), task_object.condition_channels
    targeted = info.get("sampler", "ddim") != "ddim"
    adapter: Any = FORMS[form].from_backbone(backbone.network, backbone.vae, channels, scales, targeted)
    network = backbone.network if full else add_lora(backbone.network, 2, task)
    with torch.no_grad():
        for i, (key, p) in enumerate(network.named_parameters()):
            if full or "lora_B" in key:
                p.add_(0.1 * randn(*p.shape, seed=i))
        for i, (key, p) in enumerate(adapter.named_parameters()):
            if not key.startswith(("encoder.", "net.")) or "controlnet" in key:
                p.add_(0.1 * randn(*p.shape, seed=100 + i))
    base_info = {"task": task, "task_options": task_object.config(), "family": backbone.family, "full": full}
    adapter.register_to_config(info={**base_info, **info})
    save_adapter(folder, adapter, network, full, half=False)
    return folder


def source_without_adapter(backbone: Any, shift: float = 1.0) -> Any:
    """Return a source without an adapter, with the noise shift alone."""
    loaded: Any = SimpleNamespace(info={"shift": shift})
    return Source("generate", "tiny", backbone, loaded)


def ours(source: Source, image: Tensor | None, steps: int = 4) -> Tensor:
    """Return codi's image for seed 0."""
    pipe = CoDiPipeline.from_pretrained(source.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_adapter(source.name)
    height, width = image.shape[-2:] if image is not None else (SIDE, SIDE)
    inputs = {"height": height, "width": width} if image is None else {"image": image}
    return pipe(prompt="a red ball", steps=steps, output_type="pt", **inputs).images  # type: ignore[union-attr]


def theirs(folder: Path, condition: Tensor | None) -> Tensor:
    """Return the image that the code of the model card makes, at SIDE."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    lines = code[1].replace('folder = "."', f"folder = {str(folder)!r}").replace("condition = ...", "")
    lines = lines.replace(").images[0]", ", output_type='pt').images")
    lines = re.sub(r"height=\d+, width=\d+", f"height={SIDE}, width={SIDE}", lines)
    names: dict[str, Any] = {"condition": condition}
    exec(lines, names)
    return names["picture"]


def compare(folder: Path, model: Path, name: str, form: str, **options: Any) -> float:
    """Export an adapter and return the largest difference between codi's image and the stock pipeline's."""
    source = load_source(make(folder / "adapter", name, form, **options), model)
    image = condition = None
    if form != "lora":
        image = (rand(1, 3, SIDE, SIDE, seed=3) > 0.5).float()
        condition = source.task.condition(source.task.bring(image))
    export_diffusers(source, folder / "out", steps=4)
    codi_image, stock_image = ours(source, image), theirs(folder / "out", condition)
    assert codi_image.std() > 0.01
    difference = float((codi_image - stock_image).abs().max())
    print(name, form, options, f"{difference:.1e}")
    return difference


@pytest.fixture
def trained_at_side(monkeypatch):
    """Set the training size of all backbones to SIDE, for exports of a fixed size."""
    for kind in KINDS:
        cells = SIDE // 4 if kind.name == "FLUX.2" else SIDE // 2
        monkeypatch.setattr(type(kind), "sample_size", lambda self, *_, cells=cells: cells)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0, **GUIDED}], ids=["plain", "guided"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_exported_low_rank_updates_give_the_same_image(tmp_path, models, trained_at_side, name, options):
    """Uses `load_lora_weights` and scheduler_config.json; distilled guidance becomes a low-rank update too."""
    assert compare(tmp_path, models(name), name, "lora", task="generate", **options) < TOLERANCE


@pytest.mark.parametrize("name", ["flux", "zimage", "flux2", "sana"])
def test_exported_full_networks_give_the_same_image(tmp_path, models, trained_at_side, name):
    assert compare(tmp_path, models(name), name, "lora", task="generate", full=True, **GUIDED) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"guidance_scale": 2.0}) for name in ("flux", "sd3", "sana", "zimage", "flux2", "qwenimage")),
        *((name, {"embedded_guidance": 6.0}) for name in ("flux", "flux2dev")),
    ],
)
def test_exported_adapters_with_undistilled_guidance_give_the_same_image(tmp_path, models, name, options):
    """Classifier-free guidance, or the guidance scale that some networks take as input."""
    assert compare(tmp_path, models(name), name, "lora", task="generate", **options) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"full": True}, {"shift": 2.0, **GUIDED}], ids=["lora", "full", "guided"])
def test_hint_adapter_exports_as_a_control_lora(tmp_path, models, trained_at_side, options):
    assert compare(tmp_path, models("flux"), "flux", "hint", **options) < TOLERANCE


def packed_noise(shape: tuple[int, int, int], **_: Any) -> Tensor:
    """Draw noise in image order and pack it to (B, N, 4 C)."""
    side = 2 * int(shape[1] ** 0.5)
    return pack(torch.randn(shape[0], shape[2] // 4, side, side))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_exported_controlnets_with_a_full_network_give_the_same_image(tmp_path, models, name):
    assert compare(tmp_path, models(name), name, "controlnet", full=True) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"shift": 2.0, **GUIDED}], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ["flux", "sd3", "sd35", "sana", "qwenimage"])
def test_exported_controlnets_give_the_same_image(tmp_path, models, trained_at_side, name, options):
    assert compare(tmp_path, models(name), name, "controlnet", **options) < TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "sana", "flux"])
def test_exported_consistency_sampling_draws_codis_noise(tmp_path, models, trained_at_side, name, monkeypatch):
    """For FLUX.1, packed noise is drawn in image order here, as codi draws it."""
    if name == "flux":
        monkeypatch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", packed_noise)
    assert compare(tmp_path, models(name), name, "lora", task="generate", sampler="renoise") < TOLERANCE


@pytest.mark.parametrize("full", [False, True], ids=["updates", "full"])
@pytest.mark.parametrize("name", ["sd3", "sana", "flux", "zimage"])
def test_exported_flow_maps_give_the_same_image(tmp_path, models, trained_at_side, name, full):
    options = {"form": "controlnet"} if full and name != "zimage" else {"form": "lora", "task": "generate"}
    assert compare(tmp_path, models(name), name, full=full, sampler="map", **options) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_exported_scheduler_has_the_adapters_times(tmp_path, models, trained_at_side, name, shift, steps):
    """With the arguments of the stock pipeline, after a round trip through scheduler_config.json."""
    source = source_without_adapter(FAMILIES[name](), shift)
    make_flow_scheduler(source, steps).save_pretrained(tmp_path)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if source.kind.passes_sigmas:
        config = scheduler.config if source.kind.dynamic_by_config else source.backbone.scheduler.config
        arguments["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        arguments["mu"] = source.kind.shift_exponent(config, source.cells, steps)
    scheduler.set_timesteps(**arguments)
    schedule = source.schedule(steps)
    noise = schedule.timestep(source.grid(steps)) / 1000
    torch.testing.assert_close(scheduler.sigmas.double(), noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * noise[:-1], rtol=0, atol=1e-3)


def test_exported_shift_applies_once():
    """With shift 3 the sigmas are 1, 0.9, 0.75, 0.5, 0; `set_timesteps(n)` would apply a static shift twice."""
    source = source_without_adapter(FAMILIES["sd3"]())
    scheduler = make_flow_scheduler(source, 4)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]), rtol=0, atol=1e-6)


def test_step_counts_that_a_scheduler_config_cannot_express_are_refused():
    source = source_without_adapter(FAMILIES["sd3"](), 100.0)
    with pytest.raises(UserError, match="steps 50, shift 300: .* use fewer"):
        make_flow_scheduler(source, 50)


@pytest.mark.parametrize(
    ("name", "form", "options", "why"),
    [
        ("flux", "fused", {}, "FusedAdapter .* has no place: train with `adapter: controlnet`, or sample with codi"),
        ("flux2", "fused", {}, "FusedAdapter .* has no place: train with `adapter: lora`, or sample with codi"),
        ("qwenimage", "hint", {}, "HintAdapter .* has no place: train with `adapter: controlnet`"),
        ("flux", "hint", {"task": "inpaint"}, "FluxControlPipeline reads no mask beside the picture"),
        ("flux", "hint", {"guidance_scale": 2.0}, "FluxControlPipeline has no classifier-free guidance"),
        ("sd3", "controlnet", {"task": "inpaint"}, "ControlNetPipeline reads no mask beside the picture"),
        ("qwenimage", "controlnet", {"task": "inpaint"}, "ControlNetPipeline reads no mask beside the picture"),
        ("zimage", "controlnet", {}, "ZImageControlNetPipeline adds .* to the caption's tokens too"),
        ("sana", "lora", {"task": "generate", "boundary": True}, "boundary scaling, .* or sample with codi"),
    ],
)
def test_adapters_without_a_stock_equivalent_are_refused(tmp_path, models, name, form, options, why):
    source = load_source(make(tmp_path / "adapter", name, form, **options), models(name))
    with pytest.raises(UserError, match=why) as refusal:
        export_diffusers(source, tmp_path / "out", 4)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_ldm, export_onnx])
def test_ldm_and_onnx_exports_refuse_transformers(tmp_path, models, export):
    source = load_source(make(tmp_path / "adapter", "flux", "lora", task="generate"), models("flux"))
    with pytest.raises(
        UserError, match="is for Stable Diffusion's U-Nets so far, and .* FLUX.1: export --to diffusers"
    ):
        export(source, tmp_path / "out", 4)


def test_constant_feature_of_the_time_embedding_holds_at_every_noise_level():
    """At a quarter of FLUX.1's width."""
    backbone = FAMILIES["flux"](attention_head_dim=128, num_attention_heads=6, axes_dims_rope=(16, 56, 56))
    source = source_without_adapter(backbone)
    features = source.kind.time_features(backbone.network, torch.linspace(0, 1000, 1500))
    assert ((features @ source._selectors(backbone.network, 4, 1)[0]) - 1).abs().max() < 2e-4


def test_export_command(shell, tmp_path, models):
    adapter, out = make(tmp_path / "adapter", "sana", "lora", task="generate"), tmp_path / "out"
    ran = shell("export", adapter, "--to", "diffusers", "-o", out, "--model", models("sana"), "--json")
    assert ran.code == 0, ran
    result = json.loads(ran.out)
    assert result["scheduler"] == "FlowMatchEulerDiscreteScheduler" and result["call"]["num_inference_steps"] == 4
    assert {row["path"] for row in result["files"]} == {
        str(out / name) for name in (FILE, "README.md", "scheduler/scheduler_config.json")
    }
    assert all(key.startswith("transformer.") for key in load_file(out / FILE))
