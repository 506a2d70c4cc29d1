#!/usr/bin/env bash
# Purpose: train the embedded backbone at 128 px in ONE call of ten minutes: the VAE (unless $VAE is the folder of one),
# the text-to-image transformer for the remaining time, then adapters for $ADAPTER_SECONDS each at the end.
#   OUT=runs/gpu bash gpu/mini.sh [--key value ...]                           (overrides of the recipe, RECIPE)
# Result, in at most 8 files of 16 MiB: $OUT/shard-*.bin (a folder in diffusers' layout, adapters below adapters/),
# $OUT/log.jsonl (all stages) and $OUT/preview-*.png.
# Resume: the same command with the last result's shards in $SHARDS: the VAE is kept, the transformer continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${WORK:=runs}"
: "${OUT:=$WORK/gpu}" "${SECONDS_IN_ALL:=590}" "${DEVICE:=cuda}" "${RECIPE:=mini-128}" "${RUN:=$WORK/mini-128}"
: "${ADAPTERS=depth}" "${ADAPTER_SECONDS:=75}" "${COMPILE:=true}" "${PYTHON:=python3}"
SECONDS=0                             # restart bash's timer
reserve=25                            # seconds to export and pack
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
mkdir -p "$OUT"

begin=()
if [ -n "${SHARDS:-}" ] && [ ! -d "$RUN/training" ]; then
    "$PYTHON" gpu/shards.py unpack "$SHARDS" "$WORK/start"
    begin=(--start "$WORK/start" --decoder-images 0)
elif [ -n "${VAE:-}" ]; then
    begin=(--vae "$VAE" --decoder-images 0)
fi

# shellcheck disable=SC2206 # a list of words
names=($ADAPTERS)
left=$((SECONDS_IN_ALL - SECONDS - reserve - ADAPTER_SECONDS * ${#names[@]}))
minutes=$(awk "BEGIN { print $left / 60 }")
"$PYTHON" -m codi pretrain "$RECIPE" --out "$RUN" --device "$DEVICE" --minutes "$minutes" --compile "$COMPILE" \
    "${begin[@]}" "$@"

rm -rf "$WORK/pack" && mkdir -p "$WORK/pack"
collect() { # copies the results so far to $OUT, for calls that are interrupted
    for stage in codec decoder ldm; do
        if [ -f "$RUN/training/$stage/log.jsonl" ]; then sed "s/^{/{\"stage\": \"$stage\", /" "$RUN/training/$stage/log.jsonl"; fi
        last=$(ls -1 "$RUN/training/$stage/previews/"*.png 2>/dev/null | tail -n 1 || true)
        if [ -n "$last" ]; then cp "$last" "$OUT/preview-$stage.png"; fi
    done > "$OUT/log.jsonl"
    if [ -f "$RUN/model_index.json" ]; then
        (cd "$RUN" && tar cf - --exclude=training .) | tar xf - -C "$WORK/pack"
        "$PYTHON" gpu/shards.py pack "$WORK/pack" "$OUT"
    fi
}
collect
if [ ! -f "$RUN/model_index.json" ]; then
    echo "the VAE or its decoder is not finished: run again on this machine, or with more time" >&2
    exit
fi
for name in "${names[@]}"; do
    left=$((SECONDS_IN_ALL - SECONDS - reserve / 2))
    if [ "$left" -lt $((ADAPTER_SECONDS / 2)) ]; then
        echo "$name: no time left: train it by gpu/distill-tasks.sh" >&2
        continue
    fi
    minutes=$(awk "BEGIN { print ($left < $ADAPTER_SECONDS ? $left : $ADAPTER_SECONDS) / 60 }")
    size=$(awk '/^size:/ { print $2 }' "src/codi/recipes/$RECIPE.yaml")
    "$PYTHON" -m codi distill "$name" --out "$WORK/adapters/$name" --model "$RUN" --size "${SIZE:-$size}" \
        --device "$DEVICE" --minutes "$minutes" || { echo "$name: not trained" >&2; continue; }
    mkdir -p "$WORK/pack/adapters/$name"
    cp "$WORK/adapters/$name"/config.json "$WORK/adapters/$name"/*.safetensors "$WORK/pack/adapters/$name"
    "$PYTHON" gpu/shards.py pack "$WORK/pack" "$OUT"
done
