#!/usr/bin/env bash
# Train the weights that `ttt-adapt demo` ships with, from scratch, on rendered clear-day streets: about 8 minutes on one
# CPU core. Sums are rounded in another order by other numbers of threads, hence one thread: a second run on the same
# kind of machine gives the same file, byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
ttt-adapt train street --stills 320 --size 128x192 --out "${1:-ttt_adapt/data/street/street.safetensors}" --half --device cpu \
  --encoder vit_tiny_patch16_224 --encoder-option img_size="(128, 192)" --encoder-option depth=4 \
  --recipe joint --first-epochs 30 --epochs 30 --seed 0
