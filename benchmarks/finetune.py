"""Measure the adapter `generate` on a fine-tune of the backbone that it was distilled on.

    python benchmarks/finetune.py                                # minutes on two cores
    python benchmarks/finetune.py --adapter runs/generate --updates 600

The fine-tune knows only night: the U-Net is trained on night scenes whose captions do not mention it. Both models then
sample captions of held-out night scenes that do not mention it either. If the adapter preserves what the fine-tune
learned, its few-step samples are at night too; the original backbone, in the last row, samples any time of day.

`fine-tune` is the fine-tuned backbone with classifier-free guidance, two passes per step, at the adapter's text scale;
`fine-tune + generate` is the unchanged adapter on it, `backbone + generate` the adapter on its own backbone. FD-ENLite0
is to the true renders. `night` is the share of images with a dark sky; the scene reader measures the share of correct
captions.
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
from tasks import MANY, RecordingJudge, described
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
DARK = 0.45  # threshold of mean brightness of the upper eighth: true night renders are below 0.3, others above 0.6


class NightScenes:
    """The first `count` night scenes of a split, with captions that omit the time of day."""

    def __init__(self, split: str, count: int) -> None:
        night_indices = (i for i in itertools.count() if sample_scene(0, split, i).time == "night")
        self.numbers = list(itertools.islice(night_indices, count))
        self.scenes = SceneSource(split, self.numbers[-1] + 1)

    def __len__(self) -> int:
        return len(self.numbers)

    def describe(self) -> str:
        """Return a one-line description."""
        return f"{self.scenes.describe()}: {len(self):,} of night"

    def read(
        self, indices: Sequence[int], size: int, crops: Sequence[np.random.Generator] | None = None
    ) -> list[Sample | CorruptSample]:
        """Read samples as `Source.read` does."""
        samples = self.scenes.read([self.numbers[i] for i in indices], size)
        return [
            replace(sample, text=sample.text.removesuffix(" at night"))
            for sample in samples
            if isinstance(sample, Sample)
        ]


def night_judge(read: Read) -> Judge:
    """Return a judge of whether an image shows its caption and whether its sky is dark (0 or 1)."""
    captions = caption_judge(read)

    def judge(output: Tensor, inputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        sky = output[:, :, : output.shape[2] // 8].mean((1, 2, 3))
        return {**captions(output, inputs, batch), "night": (sky < DARK).double()}

    return judge


def finetune(pipe: CoDiPipeline, data: Batch, updates: int, batch: int, learning_rate: float, seed: int = 0) -> None:
    """Train the U-Net in place by the plain diffusion loss, |v - v_hat|^2; every tenth prompt is dropped for
    classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    schedule = DiscreteSchedule.from_config(pipe.scheduler.config)
    with torch.no_grad():
        latents = torch.cat([codec.encode(pipe.vae, part) for part in data.image.split(32)])
    unet = pipe.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    for update in range(updates):
        indices = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        prompts = ["" if s else data.text[i] for i, s in zip(indices.tolist(), dropped.tolist(), strict=True)]
        x, t = latents[indices], schedule.draw(batch, 1, False, generator)
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
    """Return a pipeline of the backbone alone, without progress bars."""
    pipe = CoDiPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def methods_of(before: CoDiPipeline, after: CoDiPipeline, adapter: Path) -> list[Method]:
    """Return the methods: the fine-tune `after` in many and few steps, the adapter on it and on the backbone
    `before`."""
    accelerated = [(after, "fine-tune + generate"), (before, "backbone + generate")]
    for pipe, _ in accelerated:
        pipe.load_adapter(adapter, as_="generate", task="generate")
    scale = before.guidance().scales["text"]

    def with_adapters(adapters: Sequence[str], pipe: CoDiPipeline, method: Method) -> Method:
        def run(inputs: Tensor, prompts: list[str], steps: int, seeds: list[int]) -> Tensor:
            pipe.set_adapters(adapters)
            return method.run(inputs, prompts, steps, seeds)

        return replace(method, run=run)

    return [
        with_adapters([], after, pipeline_method(after, (MANY, FEW), "fine-tune", scale)),
        *(with_adapters(["generate"], pipe, pipeline_method(pipe, (FEW,), name)) for pipe, name in accelerated),
    ]


def main() -> None:
    """Fine-tune, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument(
        "--adapter", type=Path, default=Path("generate"), help="name of an embedded adapter, or a folder"
    )
    parser.add_argument("--scenes", type=int, default=1000, help="night scenes to fine-tune on")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--count", type=int, default=200, help="held-out night scenes")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--reader", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    backbone, finetuned, adapter = load(args.model), load(args.model), find_adapter(args.adapter, args.model)
    samples = NightScenes("train", args.scenes).read(range(args.scenes), args.size)
    training_data = collate([s for s in samples if isinstance(s, Sample)])
    finetune(finetuned, training_data, args.updates, args.batch, args.learning_rate)
    task = get_task("generate")
    judge = RecordingJudge(night_judge(functools.partial(read, load_reader(args.reader))), task)
    results = evaluate(
        methods_of(backbone, finetuned, adapter), task, NightScenes("held-out", args.count), args.count, batch=25,
        size=args.size, judge=judge, keep=1,
        progress=lambda done, total: print(f"\rmeasuring {done:,}/{total:,}", end="", file=sys.stderr),
    )  # fmt: skip
    print(file=sys.stderr)
    result: dict[str, Any] = {
        "count": results.count,
        "model": public(args.model),
        "backbone": digest(backbone.unet),
        "adapter": described({"generate": adapter})["generate"],
        "scenes": args.scenes,
        "updates": args.updates,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "guidance_scale": backbone.guidance().scales["text"],
        "judge_on_truth": means(judge.figures()),
        "rows": [asdict(row) for row in results.rows],
        "command": command_line(),
        "machine": describe_machine(),
    }
    write_json(result, args.out)


if __name__ == "__main__":
    main()
