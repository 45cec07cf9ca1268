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
case "${DATASETS_DIR:-${DATA_DIR:-none}}" in  # a public dataset that is not there is downloaded: about 16 GB
  data/demo) python data/demo.py --out data/demo --vocab-size "${VOCAB_SIZE:-1024}"; name= ;;
  none) name=sp8192 folder=data/datasets/fineweb10B_sp8192 ;;
  data/datasets/fineweb10B_sp8192_casefold_v2) name=casefold_v2 folder=$DATASETS_DIR ;;
  data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved) name=caseops_v1 folder=$DATASETS_DIR ;;
  *) name= ;;
esac
if [ -n "$name" ] && [ ! -d "$folder" ]; then python data/download.py "$name"; fi
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # idle threads that spin starve a machine that is shared
[ "${TRACKER:-none}" = none ] || python track.py &  # follows the run through their common parent, and ends with it
launch="python train_gpt.py"  # one process needs no launcher: a plain error message and a plain kill
[ "$gpus" -le 1 ] || launch="torchrun --standalone --nproc_per_node=$gpus train_gpt.py"
command -v setpriv >/dev/null && launch="setpriv --pdeathsig KILL $launch"  # it must not outlive this script
started=$(mktemp) && trap 'rm -f "$started"; kill $(jobs -p) 2>/dev/null || true' EXIT
$launch &
wait $! || exit $?
finished=$(find "${OUT_DIR:-runs}" -mindepth 2 -maxdepth 2 -name summary.json -newer "$started" | head -n 1)
[ -n "$finished" ] || exit 0
if [ "${COMPLIANCE:-0}" = 1 ]; then python compliance.py "$(dirname "$finished")" || status=1; fi
python report.py "$(dirname "$finished")"
exit "${status:-0}"
