#!/usr/bin/env bash
# Train the weights that `ttt-adapt demo` ships with, from scratch, on rendered clear-day streets: about 6 minutes on
# 2 CPU cores. Weights depend on the number of threads; those that ship were interrupted and resumed once, with 2 threads
# and then 1, so a run from the start gives like weights and not the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
ttt-adapt train street --stills 320 --size 128x192 --out "${1:-ttt_adapt/demo/street.safetensors}" --half --device cpu \
  --encoder vit_tiny_patch16_224 --encoder-option img_size="(128, 192)" --encoder-option depth=4 \
  --recipe joint --first-epochs 30 --epochs 30 --seed 0
