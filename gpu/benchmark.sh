#!/usr/bin/env bash
# Purpose: train and measure the rows of a benchmark suite, with more images and seeds than are practical on a CPU.
#   OUT=runs/gpu MINUTES=8 bash gpu/benchmark.sh [--rows codi,ldm] [--tasks depth] [--seeds 1]
# Result: $OUT/results.json with its page and plots, written after each call.
# Resume: the same command; on another machine with the last call's results.json as $RESULTS, whose rows are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=runs/gpu}" "${RUN:=runs/benchmark}" "${MINUTES:=8}" "${DEVICE:=cuda}" "${SUITE:=mini}" "${PYTHON:=python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$OUT" "$RUN"
if [ -n "${RESULTS:-}" ] && [ ! -f "$RUN/results.json" ]; then cp "$RESULTS" "$RUN/results.json"; fi
trap 'cp "$RUN"/results.json "$RUN"/benchmark* "$OUT" 2>/dev/null || true' EXIT  # even if a row failed
"$PYTHON" -m codi benchmark --suite "$SUITE" --out "$RUN" --device "$DEVICE" --minutes "$MINUTES" "$@"
