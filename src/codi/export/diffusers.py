"""For diffusers: a stock ControlNet, LoRA file or network, a stock scheduler, and the lines that sample with them.

config.json, diffusion_pytorch_model.safetensors    a ControlNet
pytorch_lora_weights.safetensors                    updates of the backbone, for `load_lora_weights`; of a hint, a
                                                    Control-LoRA
unet/ or transformer/                               the backbone trained with it (full adapters only)
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
    """Write the folder `out`, whole or not at all, in `dtype` (None: as the adapter is stored); return how to sample
    with it: the scheduler's class, the arguments of the pipeline's call. Raises UserError for an adapter that stock
    diffusers cannot express."""
    require_place(source)
    source.require_stock_sampler(STOCK)
    scheduler, arguments = make_scheduler(source, steps)
    network, updates = source.full_network(steps), source.updates(steps)
    part, stored = source.kind.component, source.loaded.folder
    updates = {key: value.to(dtype or source.stored_dtype(stored / FILE)) for key, value in updates.items()}
    if source.hint is not None:
        kind = dtype or source.stored_dtype(stored / WEIGHTS)
        hint = source.kind.control_lora(source.hint.entry)
        updates |= {key: value.to(kind) for key, value in hint.items()}

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
            edit_json(config, _name_or_path=None)  # where it lay on this machine
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors leaves them to their owner alone
        (folder / "README.md").write_text(write_card(source, scheduler, arguments, bool(updates)))

    write_folder(out, fill)
    return {"scheduler": type(scheduler).__name__, "call": arguments}


def require_place(source: Source) -> None:
    """Raises UserError for an adapter that no stock pipeline of the family has a place for."""
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
        raise UserError(f"{source.name}: {why}: {source.instead}")


def make_scheduler(source: Source, steps: int) -> tuple[Any, dict[str, Any]]:
    """(a stock scheduler that walks as our sampler does, what a stock pipeline's call is given for it).

    Jumps are multistep consistency sampling: LCM's scheduler with its boundary scaling turned off. Where DDIM's even
    "trailing" steps are ours, DDIM; otherwise first-order DPM-Solver++, which is the same and takes any timesteps.
    """
    stored, schedule = dict(source.backbone.scheduler.config), source.schedule(steps)
    guidance = source.kind.stock_call(
        source.backbone.network, source.guidance.second_pass, source.info.get("embedded_guidance")
    )
    even = {"num_inference_steps": steps}
    if isinstance(schedule, FlowSchedule):
        return make_flow_scheduler(source, steps), {**even, **guidance}
    plain: dict[str, Any] = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    timed = {"timesteps": source.timesteps(steps)}
    evenly = source.shift == 1 and schedule.horizon % steps == 0
    if source.renoises:
        far = {"original_inference_steps": int(schedule.horizon), "timestep_scaling": 1e9}
        scheduler, walk = LCMScheduler.from_config(stored, **plain, **far), even if evenly else timed
    elif evenly:
        scheduler = DDIMScheduler.from_config(stored, **plain, set_alpha_to_one=True)
        walk = even
    else:
        first = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        if stored.get("rescale_betas_zero_snr"):
            # This class would then keep more signal in the last level (alpha 2^-12) than one sees past.
            known: Any = DDIMScheduler.from_config(stored)
            betas = known.betas.clamp_max(1 - 2**-24).tolist()  # the float below 1
            plain |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
        scheduler, walk = DPMSolverMultistepScheduler.from_config(stored, **plain, **first), timed
    return scheduler, {**walk, **guidance}
