#!/usr/bin/env bash
# Purpose: the shipped adapters of all tasks (or of $TASKS), the fine-tuned many-step ones with the same budget, and the
# figures of both on held-out scenes. Result: $OUT/shard-*.bin (the adapters without the fine-tuned ones, whose use ends
# with the figures), $OUT/tasks.json, $OUT/preview-*.png. Resume: the same command, while runs/ is there.
#   OUT=runs/gpu MINUTES=1.5 TASKS="depth edit" bash gpu/distill-tasks.sh [--key value ...]     (overrides of all recipes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=runs/gpu}" "${MINUTES:=1.5}" "${DEVICE:=cuda}" "${MODEL:=mini}" "${COUNT:=500}" "${PYTHON:=python3}"
: "${TASKS:=upscale inpaint depth canny edit generate}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$OUT" runs/pack
for task in $TASKS; do
    for recipe in "$task" "$task-finetuned"; do
        if [ "$recipe" = generate-finetuned ]; then continue; fi # the backbone itself is what it is compared with
        "$PYTHON" -m codi distill "$recipe" --out "runs/$recipe" --model "$MODEL" --device "$DEVICE" --minutes "$MINUTES" "$@"
        last=$(ls -1 "runs/$recipe/previews/"*.png 2>/dev/null | tail -n 1 || true)
        if [ -n "$last" ]; then cp "$last" "$OUT/preview-$recipe.png"; fi
    done
    rm -rf "runs/pack/$task" && mkdir -p "runs/pack/$task"
    cp "runs/$task"/config.json "runs/$task"/*.safetensors "runs/pack/$task"
    if [ -d "runs/$task/unet" ]; then cp -r "runs/$task/unet" "runs/pack/$task"; fi
done
# shellcheck disable=SC2086 # a list of words
"$PYTHON" benchmarks/tasks.py --model "$MODEL" --adapters runs --finetuned runs --count "$COUNT" --tasks $TASKS --out "$OUT/tasks.json"
"$PYTHON" gpu/shards.py pack runs/pack "$OUT"
