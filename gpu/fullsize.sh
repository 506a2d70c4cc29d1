#!/usr/bin/env bash
# Purpose: latency and training step at the size of Stable Diffusion 1.5 compared with diffusers, random weights: 512
# px, batch 1 and 16; eager, compiled, CUDA graphs; time and memory of one optimizer step against LCM distillation; GPU
# memory by size of an upscaled image.
#   OUT=runs/gpu bash gpu/fullsize.sh [latency] [step] [big]
# Result: $OUT/latency-cuda-1.json, latency-cuda-16.json, train_step-cuda.json, big-cuda.json; with the GPU's best rates.
# Resume: the same command with the missing part; existing files are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=runs/gpu}" "${DEVICE:=cuda}" "${DTYPE:=bfloat16}" "${SIZE:=512}" "${BATCHES:=1 16}" "${REPEATS:=20}"
: "${SIDES:=1024 4096 8192}" "${VARIANTS:=eager channels-last compile graph}" "${STEPS:=10}" "${TRAIN_BATCH:=8}" "${PYTHON:=python3}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
for part in "${@:-latency step big}"; do
  case " $part " in *" latency "*)
    for batch in $BATCHES; do
      file="$OUT/latency-$DEVICE-$batch.json"
      [ -f "$file" ] || "$PYTHON" benchmarks/latency.py --device "$DEVICE" --dtype "$DTYPE" --size "$SIZE" \
        --batch "$batch" --repeats "$REPEATS" --variants $VARIANTS --out "$file"
    done
  esac
  case " $part " in *" step "*)
    file="$OUT/train_step-$DEVICE.json"
    [ -f "$file" ] || "$PYTHON" benchmarks/train_step.py --device "$DEVICE" --dtype "$DTYPE" --size "$SIZE" \
      --batch "$TRAIN_BATCH" --steps "$STEPS" --contestants lcm pe-codi pe-codi-guided pe-codi-lora codi --out "$file"
  esac
  case " $part " in *" big "*)
    file="$OUT/big-$DEVICE.json"
    [ -f "$file" ] || "$PYTHON" benchmarks/big.py --kind sd15 --sides $SIDES --words "--device $DEVICE --dtype $DTYPE" \
      --out "$file"
  esac
done
