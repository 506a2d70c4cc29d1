"""Z-Image (base, Turbo): one stream of image and caption tokens, each padded to whole groups by a learned token.

The network is given 1 - sigma and predicts -v. Positions of image tokens begin where the padded caption ends, so they
depend on the prompt's length, while padding up to a whole group is attended to like any other token: each prompt of a
batch keeps its own groups, and only what is beyond them is masked.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from ...errors import UserError
from .. import codec
from ..hooks import device_of
from ..text import FEATURES, PromptEncoder
from .base import stock
from .transformer import Stream, TransformerFamily, require_channels

GROUP = 32  # tokens: image and caption are each padded to a multiple of it
LENGTH, PREFIX = 512, 3  # tokens of a prompt in its chat template, and of the template before it
ENTRY = "2-1"  # the patch embedding of pictures: 2 x 2 cells, 1 frame
SHARED = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm")  # what a ControlNet has the same


def pack(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): each token is 2 x 2 cells, channels last."""
    cells = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `pack`; `grid`: rows and columns of tokens."""
    cells = tokens.unflatten(2, (2, 2, -1)).unflatten(1, grid)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def captions(network: Any, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the embedded captions (B, L, W), padded by the learned token, and how many of the L tokens belong to each
    prompt (B,), None where all do."""
    more = -text.shape[1] % GROUP
    real, counts = torch.arange(text.shape[1] + more, device=text.device) < text.shape[1], None
    text = pad(text, (0, 0, 0, more))
    if mask is not None:
        real = pad(mask.bool(), (0, more))
        counts = (real.sum(1) + GROUP - 1) // GROUP * GROUP
        if not (torch.compiler.is_compiling() or mask.is_meta):  # which want one shape for all prompts
            least, most = torch.stack(counts.aminmax()).tolist()
            text, real, counts = text[:, :most], real[:, :most], None if least == most else counts
    tokens = network.cap_embedder(text)
    return torch.where(real[..., None], tokens, network.cap_pad_token.to(tokens)), counts


def position_ids(grid: tuple[int, int], padding: int, length: int, counts: Tensor | None, device: Any) -> Tensor:
    """(B, S, 3), or (1, S, 3) where no prompt differs: place in time, row, column of image tokens, their padding and
    `length` caption tokens. The picture's time is the one after its caption."""
    counts = torch.full((1,), length, device=device) if counts is None else counts
    front = grid[0] * grid[1]
    ids = torch.zeros(len(counts), front + padding + length, 3, dtype=torch.long, device=device)
    ids[:, :front, 0] = counts[:, None] + 1
    ids[:, :front, 1] = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    ids[:, :front, 2] = torch.arange(grid[1], device=device).repeat(grid[0])
    ids[:, front + padding :, 0] = torch.arange(1, length + 1, device=device)
    return ids


def refined(network: Any, layers: Any, tokens: Tensor, *args: Any) -> Tensor:
    """Pass tokens through the refiner `layers`."""
    for layer in layers:
        if network.gradient_checkpointing and torch.is_grad_enabled():
            tokens = network._gradient_checkpointing_func(layer, tokens, *args)
        else:
            tokens = layer(tokens, *args)
    return tokens


class ZImage(TransformerFamily):
    """Z-Image and Z-Image-Turbo, which differ in weights and schedule alone."""

    name = "Z-Image"
    network = "ZImageTransformer2DModel"
    pipelines = ("ZImagePipeline",)
    file_key = "cap_pad_token"
    lora_targets = r".*\.(to_q|to_k|to_v|to_out\.0|w1|w2|w3)"
    entry_name = "all_x_embedder"
    unused = ("all_final_layer",)
    time_layer = "t_embedder.mlp.2"  # type: ignore[assignment]

    def require_usable(self, parts: Any, name: str) -> None:
        require_channels(parts, name, self.latent_channels(parts.transformer.config))
        if parts.transformer.config.get("siglip_feat_dim"):
            raise UserError(f"{name}: its network also reads reference pictures (Omni): use Z-Image or Z-Image-Turbo, "
                            "and train the task as an adapter")  # fmt: skip

    def fingerprint(self, network: Any, vae: Any, scheduler: Any) -> str:
        c = network.config
        return f"{self.name}-{self.latent_channels(c)}ch-f{codec.downscale(vae)}-{self.width(c)}x{c['n_layers']}-flow"

    # ---- prompts and guidance

    def prompts(self, parts: Any) -> PromptEncoder:
        def run(prompts: list[str]) -> dict[str, Tensor]:
            device = device_of(parts.text_encoder)
            # A copy: the stock method writes the templated prompts into the list.
            rows, _ = self.build_pipeline(parts).encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
            features = [pad(row, (0, 0, 0, LENGTH - len(row))) for row in rows]
            real = [pad(row.new_ones(len(row), dtype=torch.bool), (0, LENGTH - len(row))) for row in rows]
            return {FEATURES: torch.stack(features), "mask": torch.stack(real)}

        return PromptEncoder((parts.text_encoder,), run, [(parts.tokenizer, LENGTH - PREFIX)])

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {FEATURES: (LENGTH, config["cap_feat_dim"])}

    def guide(self, with_: Tensor, without: Tensor, scale: float) -> Tensor:
        """Combine as in all families: scale 1 is no guidance. ZImagePipeline counts from 0: its `guidance_scale` g in
        pos + g (pos - neg) is g + 1 here, its default of 5 is 6. Its options cfg_normalization and cfg_truncation, off
        by default, have no counterpart."""
        return with_ + (scale - 1) * (with_ - without)

    # ---- the network

    def width(self, config: Any) -> int:
        return config["dim"]

    def time_width(self, config: Any) -> int:
        return min(config["dim"], 256)  # ADALN_EMBED_DIM in diffusers

    def latent_channels(self, config: Any) -> int:
        return config["in_channels"]

    def depth(self, config: Any, depth: int | None) -> int:
        return depth or -(-config["n_layers"] // 2)

    def embed(self, network: Any, z: Tensor) -> Tensor:
        return network.all_x_embedder[ENTRY](pack(z))

    def embedding_weights(self, network: Any) -> dict[str, Tensor]:
        linear = network.all_x_embedder[ENTRY]
        weight = linear.weight.detach().unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
        return {"weight": weight, "bias": linear.bias.detach()}

    def start(
        self, network: Any, tokens: Tensor, grid: tuple[int, int], timestep: Tensor, text: Tensor,
        added: dict[str, Tensor], extra: Tensor | None,
    ) -> Stream:  # fmt: skip
        time = network.t_embedder((1000 - timestep) / 1000 * network.t_scale).type_as(tokens)
        time = time if extra is None else time + extra.to(time)
        size, padding = tokens.shape[1], -tokens.shape[1] % GROUP
        front = size + padding
        caption, counts = captions(network, text, added.get("mask"))
        ids = position_ids(grid, padding, caption.shape[1], counts, tokens.device)
        rope = network.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        attended = None if counts is None else torch.arange(caption.shape[1], device=text.device) < counts[:, None]
        mask = None if attended is None else pad(attended, (front, 0), value=True)
        picture = torch.cat([tokens, network.x_pad_token.to(tokens).expand(len(tokens), padding, -1)], dim=1)
        picture = refined(network, network.noise_refiner, picture, None, rope[:, :front], time)
        caption = refined(network, network.context_refiner, caption, attended, rope[:, front:])
        # The stream's image is what adapters change: without the padding, which goes with the caption.
        rest = torch.cat([picture[:, size:], caption], dim=1)
        return Stream(picture[:, :size], rest, time, grid, {"rope": rope, "mask": mask})

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.layers)

    def run(self, block: Any, image: Tensor, text: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor | None]:
        joint = block(torch.cat([image, text], dim=1), stream.rest["mask"], stream.rest["rope"], stream.time)  # type: ignore[arg-type]
        return joint[:, : image.shape[1]], joint[:, image.shape[1] :]

    def finish(self, network: Any, stream: Stream) -> Tensor:
        return -unpack(network.all_final_layer[ENTRY](stream.image, c=stream.time), stream.grid)

    # ---- adapters

    def shortened(self, config: Any, depth: int | None) -> Any:
        return stock(self.network).from_config({**config, "n_layers": self.depth(config, depth)})

    def time_features(self, network: Any, timesteps: Tensor) -> Tensor:
        embedder = network.t_embedder
        time = (1000 - timesteps.float()) / 1000 * network.t_scale
        return embedder.mlp[:2](embedder.timestep_embedding(time, embedder.frequency_embedding_size))

    def why_no_controlnet(self, controlnet: Any) -> str | None:
        return ("ZImageControlNetPipeline adds a ControlNet's samples to the caption's tokens too, which this one was "
                "trained without")  # fmt: skip

    def stock_call(self, network: Any, scale: float, embedded: float | None) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}  # see `guide`

    def new_controlnet(self, network: Any, config: Any, channels: int, downscale: int) -> nn.Module:
        """Return diffusers' class with a control block for every fifth layer. It borrows the transformer's embedders
        and refiners: here it gets copies, so that an adapter is whole and the backbone never changes."""
        kind, places = stock("ZImageControlNetModel"), list(range(0, config["n_layers"], 5))
        shape = {"control_in_dim": config["in_channels"] + channels - 3, **{name: config[name] for name in SHARED}}
        net = kind(control_layers_places=places, **shape)
        net.gradient_checkpointing = False  # which the class leaves unset and then asks for
        net = kind.from_transformer(net, stock(self.network).from_config({**config, "n_layers": 0}))
        own, weights = net.state_dict(), {} if network is None else network.state_dict()
        for key, value in own.items():
            source = re.sub(r"(?<=^control_layers\.)\d+", lambda place: str(5 * int(place[0])), key)
            found = weights.get(source.removeprefix("control_"), value)  # projections have none and stay zero
            if found.shape != value.shape:  # channels of maps, which start at zero
                found = pad(found.unflatten(1, (4, -1)), (0, channels - 3)).flatten(1)
            own[key] = found
        net.load_state_dict(own)
        return net

    def control(
        self, config: Any, controlnet: Any, condition: Tensor, z: Tensor, timestep: Tensor, text: Tensor,
        added: dict[str, Tensor] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Return its samples for image tokens; the stock pipeline adds those for captions too."""
        mask, device = (added or {}).get("mask"), z.device.type
        rows = list(text) if mask is None else [row[real] for row, real in zip(text, mask.bool(), strict=True)]
        time, read = (1000 - self._time(timestep, z)) / 1000, condition.to(z.dtype)
        pads = {name: getattr(controlnet, name) for name in ("x_pad_token", "cap_pad_token")}
        if device != "meta" and torch.is_autocast_enabled(device):  # they are written into tokens of autocast's type
            pads = {name: token.to(torch.get_autocast_dtype(device)) for name, token in pads.items()}
        samples = functional_call(controlnet, pads, (list(z.unsqueeze(2)), time, rows, list(read.unsqueeze(2))))
        count = z.shape[-2] * z.shape[-1] // 4
        return [samples[i][:, :count] if i in samples else None for i in range(config["n_layers"])]
