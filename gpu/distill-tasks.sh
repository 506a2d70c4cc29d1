#!/usr/bin/env bash
# Purpose: train the adapters of $TASKS and fine-tuned many-step adapters with the same budget, and measure both on
# held-out scenes. Other recipes can be trained too: upscale-x8, depth-full, depth-hint; a fine-tuned counterpart is
# trained if its recipe exists, and recipes named -full or -hint are measured with their task.
# Two stages, each for as many tasks as a call has time and space for (two in ten minutes and 64 MiB):
#   STAGE=train   TASKS="inpaint depth" OUT=runs/gpu bash gpu/distill-tasks.sh [--key value ...]    (overrides of recipes)
#   STAGE=measure TASKS="inpaint depth composition" bash gpu/distill-tasks.sh [--key value ...]     (of benchmarks/tasks.py)
# Result: $OUT/shard-*.bin, this call's adapters and their last previews, rewritten after each adapter;
# $OUT/tasks.json, written after each task: the content of benchmarks/results/tasks.json and the new figures.
# Resume: the same command with the same $RUNS; on another machine with the last result's shards in $SHARDS: finished
# adapters are kept, the others continue from their weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${STAGE:?train or measure}" "${TASKS:?the tasks of this call}"
: "${OUT:=runs/gpu}" "${RUNS:=runs}" "${MINUTES:=1.5}" "${DEVICE:=cuda}" "${MODEL:=mini}" "${SIZE:=64}" "${COUNT:=500}"
: "${PYTHON:=python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$OUT" "$RUNS"
if [ -n "${SHARDS:-}" ] && [ ! -d "$RUNS/start" ]; then
    "$PYTHON" gpu/shards.py unpack "$SHARDS" "$RUNS/start"
    cp -r "$RUNS/start/." "$RUNS"
fi

train() { # RECIPE [--key value ...]
    local run="$RUNS/$1" pack="$RUNS/pack/$1" from=()
    if [ -d "$RUNS/start/$1" ]; then from=(--start "$RUNS/start/$1"); fi
    if ! grep -qs '"finished": true' "$run/config.json"; then
        "$PYTHON" -m codi distill "$1" --out "$run" --model "$MODEL" --size "$SIZE" --device "$DEVICE" \
            --minutes "$MINUTES" "${from[@]}" "${@:2}"
        cp "$(ls -1 "$run/previews/"*.png | tail -n 1)" "$run/preview.png"
    fi
    mkdir -p "$pack"
    cp "$run"/config.json "$run"/*.safetensors "$run"/preview.png "$pack"
    if [ -d "$run/unet" ]; then cp -r "$run/unet" "$pack"; fi
    "$PYTHON" gpu/shards.py pack "$RUNS/pack" "$OUT"
}

case "$STAGE" in
train)
    rm -rf "$RUNS/pack"
    for task in $TASKS; do
        train "$task" "$@"
        if [ -f "src/codi/recipes/$task-finetuned.yaml" ]; then train "$task-finetuned" "$@"; fi
    done
    ;;
measure)
    if [ -f benchmarks/results/tasks.json ] && [ ! -f "$OUT/tasks.json" ]; then
        cp benchmarks/results/tasks.json "$OUT"
    fi
    rows=()
    for folder in "$RUNS"/*-full "$RUNS"/*-hint; do
        if [ ! -f "$folder/config.json" ]; then continue; fi # no match, or unfinished
        case "$folder" in *-full) rows+=("codi=$folder") ;; *) rows+=("hint=$folder") ;; esac
    done
    # shellcheck disable=SC2086 # a list of words
    "$PYTHON" benchmarks/tasks.py --model "$MODEL" --adapters "$RUNS" --finetuned "$RUNS" --size "$SIZE" \
        --count "$COUNT" --device "$DEVICE" --tasks $TASKS --rows "${rows[@]}" --out "$OUT/tasks.json" "$@"
    ;;
*)
    echo "STAGE=$STAGE: not known: use train or measure" >&2
    exit 2
    ;;
esac
