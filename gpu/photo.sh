#!/usr/bin/env bash
# Purpose: the embedded backbone of photographs at 256 px and its adapters, from WebDataset shards of photographs.
#   STAGE=backbone TRAIN='photos-{00..03}.tar' HELD=held-out.tar OUT=runs/gpu MINUTES=9 bash gpu/photo.sh [--key value ...]
#   STAGE=adapters TASKS="photo-upscale photo-inpaint" MINUTES=4 ... bash gpu/photo.sh [--key value ...]
# Stages as pretrain-mini.sh and distill-tasks.sh, which do the work: there stands what OUT holds and how to resume.
# A call of ten minutes: the backbone (twice, with the first result as SHARDS, is better); then, with its folder copied to
# src/codi/weights/photo, two adapters a call: photo-upscale photo-upscale-real, then photo-inpaint photo-canny.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${STAGE:?backbone or adapters}" "${TRAIN:?shards to train on}" "${HELD:?shards held out}"
: "${DEVICE:=cuda}" "${SIZE:=256}"
export DEVICE
told=(--data "$TRAIN" --held_out "$HELD")
if [ "$DEVICE" = cuda ]; then told+=(--precision bf16); fi

case "$STAGE" in
backbone)
    RECIPE=photo RUN="${RUN:-runs/photo}" bash gpu/pretrain-mini.sh "${told[@]}" --size "$SIZE" --vae_images 600000 \
        --vae_batch 128 --vae_crop 64 --ldm_images 1000000 --ldm_batch 64 --log_every 12800 --preview_every 128000 \
        --checkpoint_every 128000 "$@"
    ;;
adapters)
    : "${TASKS:?the recipes of this call}"
    STAGE=train TASKS="$TASKS" MODEL="${MODEL:-photo}" SIZE="$SIZE" bash gpu/distill-tasks.sh "${told[@]}" \
        --images 1000000 --batch_size 64 --zoom '[1, 1.5]' "$@"
    ;;
*)
    echo "STAGE=$STAGE: not known: use backbone or adapters" >&2
    exit 2
    ;;
esac
