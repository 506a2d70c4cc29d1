#!/usr/bin/env bash
# Purpose: the shipped upscalers, CoDi and fine-tuned with one image budget, and their figures on 500 held-out scenes.
# Result: $OUT/shard-*.bin (the adapters' folders), $OUT/upscale.json. Resume: the same command, while runs/ is there.
#   OUT=runs/gpu MINUTES=4 bash gpu/distill-upscale.sh [--key value ...]     (overrides of both recipes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=runs/gpu}" "${MINUTES:=4}" "${DEVICE:=cuda}" "${MODEL:=mini}" "${COUNT:=500}" "${PYTHON:=python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$OUT"
for recipe in upscale upscale-finetuned; do
    "$PYTHON" -m codi distill "$recipe" --out "runs/$recipe" --model "$MODEL" --device "$DEVICE" --minutes "$MINUTES" "$@"
done
"$PYTHON" -m codi evaluate --task upscale --model "$MODEL" --adapter runs/upscale --finetuned runs/upscale-finetuned \
    --data "scenes:held-out:$COUNT" --count "$COUNT" --steps 1,2,4 --degradation bicubic --seed 0 --json --overwrite --out "$OUT/upscale.json"
rm -rf runs/pack && mkdir -p runs/pack
for recipe in upscale upscale-finetuned; do
    (cd "runs/$recipe" && find . -name '*.json' -not -path './checkpoints/*' -o -name '*.safetensors' -not -path './checkpoints/*' |
        tar cf - -T -) | (mkdir -p "runs/pack/$recipe" && tar xf - -C "runs/pack/$recipe")
done
"$PYTHON" gpu/shards.py pack runs/pack "$OUT"
