#!/usr/bin/env bash
# Train the weights that `ttt-adapt demo` ships with, from scratch, on rendered clear-day streets: about 6 minutes on
# 2 CPU cores. The same command on the same machine gives the same file.
set -euo pipefail
cd "$(dirname "$0")/.."
ttt-adapt train street --stills 320 --size 128x192 --out "${1:-ttt_adapt/demo/street.safetensors}" --half --device cpu \
  --encoder vit_tiny_patch16_224 --encoder-option img_size="(128, 192)" --encoder-option depth=4 \
  --recipe joint --first-epochs 30 --epochs 30 --seed 0
