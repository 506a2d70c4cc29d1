"""The accelerator on a backbone it never saw: `generate`, distilled on one, set on a fine-tune of it.

    python benchmarks/finetune.py                                # minutes on two cores
    python benchmarks/finetune.py --adapter runs/generate --updates 600

The fine-tune knows only night: the U-Net is trained on night scenes under captions that do not say so. Held-out night
scenes are then asked for by captions as silent. A fine-tune whose knowledge survives draws nights in few steps too; the
backbone as it was, in the last row, draws what time of day it likes.

`fine-tune` is the trained backbone with classifier-free guidance, two passes a step, at the adapter's text scale;
`fine-tune + generate` the adapter on it, untouched, and `backbone + generate` the adapter where it was made. FD-ENLite0
is to the true renders. `night` is the share of pictures whose sky is dark; the reader says the share of captions right.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command_line, public
from judges import Judge, Read, caption_judge
from reading import WEIGHTS, load_reader, read
from tasks import MANY, Witness, described
from torch import Tensor

from codi.data.batches import Batch, collate
from codi.data.scenes import sample_scene
from codi.data.sources import CorruptSample, Sample, SceneSource
from codi.evaluation.evaluate import Method, describe_machine, evaluate, pipeline_method
from codi.evaluation.report import write_json
from codi.models import codec
from codi.models.adapter_files import find_adapter
from codi.models.backbones import digest
from codi.models.student import Conditioning, Student
from codi.models.text import embed_prompts
from codi.sampling.pipeline import CoDiPipeline
from codi.schedule import DiscreteSchedule
from codi.tasks import get_task, means

RESULTS = Path("benchmarks/results/finetune.json")
FEW = 4
DARK = 0.45  # brightness of the upper eighth: of true renders nights are below 0.3 there, other times above 0.6


class NightScenes:
    """The first `count` night scenes of a split, under captions without the time of day."""

    def __init__(self, split: str, count: int) -> None:
        nights = (i for i in itertools.count() if sample_scene(0, split, i).time == "night")
        self.numbers = list(itertools.islice(nights, count))
        self.scenes = SceneSource(split, self.numbers[-1] + 1)

    def __len__(self) -> int:
        return len(self.numbers)

    def describe(self) -> str:
        """One line for people."""
        return f"{self.scenes.describe()}: {len(self):,} of night"

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """As `Source.read`."""
        found = self.scenes.read([self.numbers[i] for i in indices], size)
        return [replace(s, text=s.text.removesuffix(" at night")) for s in found if isinstance(s, Sample)]


def night_judge(read: Read) -> Judge:
    """Whether a picture shows its caption, and whether its sky is dark (0 or 1)."""
    captions = caption_judge(read)

    def judge(output: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
        sky = output[:, :, : output.shape[2] // 8].mean((1, 2, 3))
        return {**captions(output, given, batch), "night": (sky < DARK).double()}

    return judge


def finetune(
    pipe: CoDiPipeline, pictures: Batch, updates: int, batch: int, learning_rate: float, seed: int = 0
) -> None:
    """Trains the U-Net in place by the plain diffusion loss, |v - v_hat|^2; every tenth prompt is left out, so that
    guidance has its other pass."""
    generator = torch.Generator().manual_seed(seed)
    schedule = DiscreteSchedule.from_config(pipe.scheduler.config)
    with torch.no_grad():
        latents = torch.cat([codec.encode(pipe.vae, part) for part in pictures.image.split(32)])
    unet = pipe.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    for update in range(updates):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        silent = torch.rand(batch, generator=generator) < 0.1
        prompts = ["" if s else pictures.text[i] for i, s in zip(chosen.tolist(), silent.tolist(), strict=True)]
        x, t = latents[chosen], schedule.draw(batch, 1, False, generator)
        eps = torch.randn(x.shape, generator=generator)
        text = embed_prompts(pipe.text, prompts)[0]
        output = Student(unet)(schedule.mix(x, eps, t), schedule.timestep(t), Conditioning(text))
        loss = (output - schedule.output(x, eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"\rfine-tuning {update + 1:,}/{updates:,}, loss {loss.item():.3f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    unet.requires_grad_(False)


def load(model: str) -> CoDiPipeline:
    """The backbone alone, without bars."""
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def methods_of(before: CoDiPipeline, after: CoDiPipeline, adapter: Path) -> list[Method]:
    """The fine-tune `after` in many steps and few, the adapter on it, and on the backbone `before`."""
    few = [(after, "fine-tune + generate"), (before, "backbone + generate")]
    for pipe, _ in few:
        pipe.load_adapter(adapter, as_="generate", task="generate")
    scale = before.guidance().scales["text"]

    def with_(adapters: Sequence[str], pipe: CoDiPipeline, method: Method) -> Method:
        def run(given: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
            pipe.set_adapters(adapters)
            return method.run(given, prompts, steps, seeds)

        return replace(method, run=run)

    return [
        with_([], after, pipeline_method(after, (MANY, FEW), "fine-tune", scale)),
        *(with_(["generate"], pipe, pipeline_method(pipe, (FEW,), name)) for pipe, name in few),
    ]


def main() -> None:
    """Fine-tunes, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--adapter", type=Path, default=Path("generate"), help="embedded, or a folder")
    parser.add_argument("--scenes", type=int, default=1000, help="night scenes to fine-tune on")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--count", type=int, default=200, help="held-out night scenes")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    before, after, adapter = load(args.model), load(args.model), find_adapter(args.adapter, args.model)
    shown = NightScenes("train", args.scenes).read(range(args.scenes), args.size)
    pictures = collate([s for s in shown if isinstance(s, Sample)])
    finetune(after, pictures, args.updates, args.batch, args.learning_rate)
    task = get_task("generate")
    witness = Witness(night_judge(functools.partial(read, load_reader(args.reader))), task)
    results = evaluate(
        methods_of(before, after, adapter), task, NightScenes("held-out", args.count), args.count, batch=25,
        size=args.size, judge=witness, keep=1,
        progress=lambda done, total: print(f"\rmeasuring {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    told: dict[str, Any] = {
        "count": results.count,
        "model": public(args.model),
        "backbone": digest(before.unet),
        "adapter": described({"generate": adapter})["generate"],
        "scenes": args.scenes,
        "updates": args.updates,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "guidance_scale": before.guidance().scales["text"],
        "judge_on_truth": means(witness.figures()),
        "rows": [asdict(row) for row in results.rows],
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(told, args.out)


if __name__ == "__main__":
    main()
