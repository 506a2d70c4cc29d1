"""Export for diffusers: a stock ControlNet, LoRA file or network, a stock scheduler, and code that samples with them.

config.json, diffusion_pytorch_model.safetensors    a ControlNet
pytorch_lora_weights.safetensors                    updates of the backbone, for `load_lora_weights`; for a hint, a
                                                    Control-LoRA
unet/ or transformer/                               the backbone trained with the adapter (full adapters only)
scheduler/, README.md                               how to sample
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from safetensors.torch import save_file

from ..errors import UserError
from ..files import write_folder
from ..models.lora import FILE
from ..schedule import FlowSchedule
from ..training.checkpoint import edit_json
from .card import write_card
from .flow_scheduler import make_flow_scheduler
from .source import WEIGHTS, Source

STOCK = "stock diffusers"


def export_diffusers(source: Source, out: Path, steps: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the folder `out` atomically, in `dtype` (None: as the adapter is stored); return how to sample with it: the
    scheduler's class and the arguments of the pipeline's call. Raises UserError for an adapter that stock diffusers
    cannot load."""
    require_stock_pipeline(source)
    source.require_stock_sampler(STOCK)
    scheduler, arguments = make_scheduler(source, steps)
    network, updates = source.full_network(steps), source.updates(steps)
    part, stored = source.kind.component, source.loaded.folder
    updates = {key: value.to(dtype or source.stored_dtype(stored / FILE)) for key, value in updates.items()}
    if source.hint is not None:
        hint_dtype = dtype or source.stored_dtype(stored / WEIGHTS)
        hint = source.kind.control_lora(source.hint.entry)
        updates |= {key: value.to(hint_dtype) for key, value in hint.items()}

    def save(module: Any, folder: Path, file: Path) -> None:
        copy.deepcopy(module).to(dtype or source.stored_dtype(file)).save_pretrained(folder)

    def fill(folder: Path) -> None:
        if source.control is not None:
            save(source.control.net, folder, stored / WEIGHTS)
        if network is not None:
            save(network, folder / part, stored / part)
        if updates:
            weights = {f"{part}.{key}": value.contiguous() for key, value in updates.items()}
            save_file(weights, folder / FILE, {"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
        for config in folder.rglob("config.json"):
            edit_json(config, _name_or_path=None)  # a local path
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors makes them readable by their owner only
        (folder / "README.md").write_text(write_card(source, scheduler, arguments, bool(updates)))

    write_folder(out, fill)
    return {"scheduler": type(scheduler).__name__, "call": arguments}


def require_stock_pipeline(source: Source) -> None:
    """Raise UserError for an adapter that no stock pipeline of the family can load."""
    why = None
    if source.control is not None:
        why = source.kind.why_no_controlnet(source.control.net)
    elif source.hint is not None and source.kind.control_pipeline is not None:
        if source.hint.config["condition_channels"] != 3:
            why = f"{source.kind.control_pipeline} reads no mask beside the picture"
        elif source.guidance.second_pass != 1:
            why = f"{source.kind.control_pipeline} has no classifier-free guidance"
    else:
        source.refuse_form(STOCK)
    if why is not None:
        raise UserError(f"{source.name}: {why}: {source.alternative}")


def make_scheduler(source: Source, steps: int) -> tuple[Any, dict[str, Any]]:
    """Return a stock scheduler that takes the steps of our sampler, and the arguments of the pipeline's call for it.

    The "renoise" sampler is multistep consistency sampling: LCM's scheduler with its boundary scaling turned off.
    Otherwise DDIM where our steps are its even "trailing" ones, else first-order DPM-Solver++, which is the same
    sampler and takes any timesteps.
    """
    stored, schedule = dict(source.backbone.scheduler.config), source.schedule(steps)
    guidance = source.kind.stock_call(
        source.backbone.network, source.guidance.second_pass, source.info.get("embedded_guidance")
    )
    even = {"num_inference_steps": steps}
    if isinstance(schedule, FlowSchedule):
        return make_flow_scheduler(source, steps), {**even, **guidance}
    plain: dict[str, Any] = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    custom = {"timesteps": source.timesteps(steps)}
    is_even = source.shift == 1 and schedule.horizon % steps == 0
    if source.renoises:
        unscaled = {"original_inference_steps": int(schedule.horizon), "timestep_scaling": 1e9}
        scheduler, times = LCMScheduler.from_config(stored, **plain, **unscaled), even if is_even else custom
    elif is_even:
        scheduler = DDIMScheduler.from_config(stored, **plain, set_alpha_to_one=True)
        times = even
    else:
        first_order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        if stored.get("rescale_betas_zero_snr"):
            # This class would otherwise keep visibly too much signal at the last noise level (alpha 2^-12).
            rescaled: Any = DDIMScheduler.from_config(stored)
            betas = rescaled.betas.clamp_max(1 - 2**-24).tolist()  # the largest float below 1
            plain |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
        scheduler, times = DPMSolverMultistepScheduler.from_config(stored, **plain, **first_order), custom
    return scheduler, {**times, **guidance}
