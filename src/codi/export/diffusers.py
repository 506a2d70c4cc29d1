"""For diffusers: a stock ControlNet, LoRA file or U-Net, a stock scheduler, and the lines that sample with them.

config.json, diffusion_pytorch_model.safetensors    a ControlNetModel
pytorch_lora_weights.safetensors                    updates of the backbone, for `load_lora_weights`
unet/                                               the backbone trained with it (full adapters only)
scheduler/, README.md                               how to sample
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from safetensors.torch import save_file

from ..models.lora import FILE
from ..training.checkpoint import edit_json, write_atomically
from .card import write_card
from .source import Source


def export_diffusers(source: Source, out: Path, steps: int) -> dict[str, Any]:
    """Writes the folder `out`, whole or not at all; returns how to sample with it: the scheduler's class, the arguments
    of the pipeline's call. Raises UserError for an adapter that stock diffusers cannot express."""
    source.refuse_what_is_ours("stock diffusers")
    scheduler, arguments = make_scheduler(source, steps)
    unet, updates = source.full_unet(), source.updates(steps)

    def fill(folder: Path) -> None:
        if source.control is not None:
            source.control.net.save_pretrained(folder)
        if unet is not None:
            unet.save_pretrained(folder / "unet")
        if updates:
            weights = {f"unet.{key}": value.contiguous() for key, value in updates.items()}
            save_file(weights, folder / FILE, {"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
        for config in folder.rglob("config.json"):
            edit_json(config, _name_or_path=None)  # where it lay on this machine
        for weights in folder.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors leaves them to their owner alone
        (folder / "README.md").write_text(write_card(source, type(scheduler).__name__, arguments, bool(updates)))

    write_atomically(out, fill)
    return {"scheduler": type(scheduler).__name__, "call": arguments}


def make_scheduler(source: Source, steps: int) -> tuple[Any, dict[str, Any]]:
    """(a stock scheduler that walks as our sampler does, what a stock pipeline's call is given for it).

    Jumps are multistep consistency sampling: LCM's scheduler with its boundary scaling turned off. Where DDIM's even
    "trailing" steps are ours, DDIM; otherwise first-order DPM-Solver++, which is the same and takes any timesteps.
    """
    stored, schedule = dict(source.backbone.scheduler.config), source.backbone.schedule
    plain: dict[str, Any] = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    timed = {"timesteps": source.timesteps(steps)}
    if source.jumps:
        far = {"original_inference_steps": int(schedule.horizon), "timestep_scaling": 1e9}
        scheduler, walk = LCMScheduler.from_config(stored, **plain, **far), timed
    elif source.shift == 1 and schedule.horizon % steps == 0:
        scheduler = DDIMScheduler.from_config(stored, **plain, set_alpha_to_one=True)
        walk = {"num_inference_steps": steps}
    else:
        first = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        if stored.get("rescale_betas_zero_snr"):
            # This class would then keep more signal in the last level (alpha 2^-12) than one sees past.
            known: Any = DDIMScheduler.from_config(stored)
            betas = known.betas.clamp_max(1 - 2**-24).tolist()  # the float below 1
            plain |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
        scheduler, walk = DPMSolverMultistepScheduler.from_config(stored, **plain, **first), timed
    return scheduler, {**walk, "guidance_scale": source.guidance.second_pass}
