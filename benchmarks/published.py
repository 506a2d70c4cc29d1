"""Configurations of published checkpoints, as far as an architecture needs them, and models of them without weights.

    python benchmarks/published.py flux FOLDER     # a folder of configurations, for `codi distill ... --dry-run`

The numbers are those of the checkpoints' own config.json files. `build` makes a network of one on any device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

KL = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 16, "layers_per_block": 2, "sample_size": 1024,
    "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip
CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "projection_dim": 768}  # fmt: skip
CLIP_G = {"vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
          "num_attention_heads": 20, "projection_dim": 1280}  # fmt: skip
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
QWEN3_4B = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QWEN25_VL = {
    "text_config": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                    "num_attention_heads": 28, "num_key_value_heads": 4},
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                      "out_hidden_size": 3584},
}  # fmt: skip
GEMMA2_2B = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}  # fmt: skip
DC_AE = {
    "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
}  # fmt: skip
SANA = {
    "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "cross_attention_head_dim": 72,
    "caption_channels": 2304, "mlp_ratio": 2.5, "patch_size": 1, "sample_size": 32,
}  # fmt: skip

# Of each checkpoint: the pipeline, its size in pixels, and {component: (class, configuration)}.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "sd35-medium": {
        "pipeline": "StableDiffusion3Pipeline",
        "parts": {
            "transformer": ("SD3Transformer2DModel", {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
            }),
            "vae": ("AutoencoderKL", {**KL, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
            "text_encoder_3": ("T5EncoderModel", T5_XXL),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    },
    "flux": {
        "pipeline": "FluxPipeline",
        "parts": {
            "transformer": ("FluxTransformer2DModel", {
                "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                "guidance_embeds": True,
            }),
            "vae": ("AutoencoderKL", {**KL, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("T5EncoderModel", T5_XXL),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {
                "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
            }),
        },
    },
    "flux2-klein-4b": {
        "pipeline": "Flux2KleinPipeline",
        "parts": {
            "transformer": ("Flux2Transformer2DModel", {
                "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
                "mlp_ratio": 3.0, "guidance_embeds": False,
            }),
            "vae": ("AutoencoderKLFlux2", {}),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3_4B),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        },
    },
    "zimage": {
        "pipeline": "ZImagePipeline",
        "parts": {
            "transformer": ("ZImageTransformer2DModel", {
                "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30,
                "n_kv_heads": 30, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
            }),
            "vae": ("AutoencoderKL", {**KL, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("Qwen3Model", QWEN3_4B),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
        },
    },
    "qwen-image": {
        "pipeline": "QwenImagePipeline",
        "parts": {
            "transformer": ("QwenImageTransformer2DModel", {
                "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
            }),
            "vae": ("AutoencoderKLQwenImage", {}),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN25_VL),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {
                "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
                "max_image_seq_len": 8192, "shift_terminal": 0.02,
            }),
        },
    },
    "sana-0.6b": {
        "pipeline": "SanaPipeline",
        "parts": {
            "transformer": ("SanaTransformer2DModel", {
                **SANA, "num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16,
                "cross_attention_dim": 1152,
            }),
            "vae": ("AutoencoderDC", DC_AE), "text_encoder": ("Gemma2Model", GEMMA2_2B),
            "scheduler": ("DPMSolverMultistepScheduler", {
                "flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
            }),
        },
    },
    "sana-1.6b": {
        "pipeline": "SanaPipeline",
        "parts": {
            "transformer": ("SanaTransformer2DModel", {
                **SANA, "num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
            }),
            "vae": ("AutoencoderDC", DC_AE), "text_encoder": ("Gemma2Model", GEMMA2_2B),
            "scheduler": ("DPMSolverMultistepScheduler", {
                "flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
            }),
        },
    },
}  # fmt: skip


def build(checkpoint: str, part: str) -> Any:
    """Return one part, with random weights, on torch's default device and dtype."""
    kind, config = CHECKPOINTS[checkpoint]["parts"][part]
    if hasattr(diffusers, kind):
        return getattr(diffusers, kind)(**config)
    model: Any = getattr(transformers, kind)
    return model(model.config_class(**config))


def write_configurations(checkpoint: str, folder: Path) -> Path:
    """Write the folder that `--dry-run` reads: model_index.json and every part's configuration, without weights."""
    index: dict[str, Any] = {"_class_name": CHECKPOINTS[checkpoint]["pipeline"]}
    for part, (kind, config) in CHECKPOINTS[checkpoint]["parts"].items():
        of_diffusers = hasattr(diffusers, kind)
        index[part] = ["diffusers" if of_diffusers else "transformers", kind]
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        if of_diffusers:
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (target / name).write_text(json.dumps({"_class_name": kind, **config}, indent=2) + "\n")
        else:
            getattr(transformers, kind).config_class(**config).save_pretrained(target)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in CHECKPOINTS:
        sys.exit(f"usage: published.py {{{','.join(CHECKPOINTS)}}} FOLDER")
    torch.set_default_device("meta")
    print(write_configurations(sys.argv[1], Path(sys.argv[2])))
