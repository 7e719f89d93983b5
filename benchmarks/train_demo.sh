#!/usr/bin/env bash
# Train the weights that `ttt-adapt demo` ships with, from scratch, on rendered clear-day streets: about 20 minutes on one
# idle CPU core. Sums are rounded in another order by other numbers of threads, hence one thread. The model is calibrated
# at the end, on its own training stills.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
ttt-adapt train street --stills 1600 --size 128x192 --out "${1:-ttt_adapt/data/street/street.safetensors}" --half --device cpu --overwrite \
  --encoder regnetx_002 --branch patch_size=8 --recipe joint --first-epochs 12 --epochs 6 --seed 0
