#!/usr/bin/env bash
# Purpose: train the embedded backbone at 128 px. Result: $OUT/shard-*.bin (a Stable Diffusion folder), $OUT/log-*.jsonl, previews.
# Resume: run it again with the last result's shards in $SHARDS: the text-to-image stage continues from those weights.
#   OUT=runs/gpu MINUTES=9 bash gpu/pretrain-mini.sh [--key value ...]     (overrides of the recipe, RECIPE)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=runs/gpu}" "${MINUTES:=9}" "${DEVICE:=cuda}" "${RECIPE:=mini-128}" "${RUN:=runs/mini-128}"
: "${PYTHON:=python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$OUT"
start=()
if [ -n "${SHARDS:-}" ] && [ ! -d "$RUN/training" ]; then
    "$PYTHON" gpu/shards.py unpack "$SHARDS" runs/start
    start=(--start runs/start --decoder-images 0)
fi
"$PYTHON" -m codi pretrain "$RECIPE" --out "$RUN" --device "$DEVICE" --minutes "$MINUTES" "${start[@]}" "$@"
for stage in codec decoder ldm; do
    if [ -f "$RUN/training/$stage/log.jsonl" ]; then cp "$RUN/training/$stage/log.jsonl" "$OUT/log-$stage.jsonl"; fi
    last=$(ls -1 "$RUN/training/$stage/previews/"*.png 2>/dev/null | tail -n 1 || true)
    if [ -n "$last" ]; then cp "$last" "$OUT/preview-$stage.png"; fi
done
if [ -f "$RUN/model_index.json" ]; then
    rm -rf runs/pack && mkdir -p runs/pack
    (cd "$RUN" && tar cf - --exclude=training .) | tar xf - -C runs/pack
    "$PYTHON" gpu/shards.py pack runs/pack "$OUT"
elif [ -d "$RUN/training/codec" ]; then
    echo "the codec or its decoder is not finished: run again on this machine, or with more MINUTES" >&2
fi
