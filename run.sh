#!/usr/bin/env bash
# Train, quantise, pack and score a model:  ./run.sh [recipe.env]
# Settings come from the recipe and, above it, from the caller's environment:  SEED=2 ./run.sh
# Without a GPU the default recipe is records/recipes/cpu_demo.env: a complete run on the embedded corpus in minutes.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
recipe=${1:-}
if [ -z "$recipe" ] && [ "$gpus" -eq 0 ]; then recipe=records/recipes/cpu_demo.env; fi
if [ -n "$recipe" ]; then
  [ -f "$recipe" ] || { echo "$recipe: no such recipe; there are: $(ls records/recipes/*.env | tr '\n' ' ')" >&2; exit 2; }
  while IFS='=' read -r name value; do  # a variable that the caller has set stays as it is
    case "$name" in ''|'#'*) continue ;; esac
    [ -n "${!name+set}" ] || export "$name=$value"
  done < "$recipe"
fi

python train_gpt.py --print-config > /dev/null  # a wrong setting stops here, before any data is made
if [ "${DATASETS_DIR:-}" = data/demo ]; then
  python data/demo.py --out data/demo --vocab-size "${VOCAB_SIZE:-1024}"
elif [ -z "${DATASETS_DIR:-}${DATA_DIR:-}" ] && [ ! -d data/datasets/fineweb10B_sp8192 ]; then
  python data/download.py sp8192  # 80 training shards, 16 GB; fewer with --train-shards
fi
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # idle threads that spin starve a machine that is shared
if [ "$gpus" -gt 1 ]; then
  exec torchrun --standalone --nproc_per_node="$gpus" train_gpt.py
fi
exec python train_gpt.py  # one process needs no launcher: a plain error message and a plain kill
