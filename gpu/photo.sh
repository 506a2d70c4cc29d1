#!/usr/bin/env bash
# Purpose: train the embedded backbone of photographs at 256 px and its adapters on WebDataset shards.
#   STAGE=backbone TRAIN='photos-{00..03}.tar' HELD=held-out.tar OUT=runs/gpu MINUTES=9 bash gpu/photo.sh [--key value ...]
#   STAGE=adapters TASKS="photo-upscale photo-inpaint" MINUTES=4 ... bash gpu/photo.sh [--key value ...]
# The stages call pretrain-mini.sh and distill-tasks.sh, which document the contents of OUT and how to resume.
# In calls of ten minutes: the backbone (better twice, the second time with the first result as SHARDS); then, with its
# folder copied to src/codi/weights/photo, two adapters per call: photo-upscale photo-upscale-real, then photo-inpaint
# photo-canny.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${STAGE:?backbone or adapters}" "${TRAIN:?shards to train on}" "${HELD:?shards held out}"
: "${DEVICE:=cuda}" "${SIZE:=256}"
export DEVICE
options=(--data "$TRAIN" --held_out "$HELD")
if [ "$DEVICE" = cuda ]; then options+=(--precision bf16); fi

case "$STAGE" in
backbone)
    RECIPE=photo RUN="${RUN:-runs/photo}" bash gpu/pretrain-mini.sh "${options[@]}" --size "$SIZE" --vae_images 600000 \
        --vae_batch 128 --vae_crop 64 --ldm_images 1000000 --ldm_batch 64 --log_every 12800 --preview_every 128000 \
        --checkpoint_every 128000 "$@"
    ;;
adapters)
    : "${TASKS:?the recipes of this call}"
    STAGE=train TASKS="$TASKS" MODEL="${MODEL:-photo}" SIZE="$SIZE" bash gpu/distill-tasks.sh "${options[@]}" \
        --images 1000000 --batch_size 64 --zoom '[1, 1.5]' "$@"
    ;;
*)
    echo "STAGE=$STAGE: not known: use backbone or adapters" >&2
    exit 2
    ;;
esac
