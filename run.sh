#!/usr/bin/env bash
# Train, quantise, pack and score a model:  ./run.sh [recipe.env]
# Settings come from the recipe and, above it, from the caller's environment:  SEED=2 ./run.sh
# Without a GPU the default recipe is records/recipes/cpu_demo.env: a complete run on the embedded corpus in minutes.
# PYTHON=/path/to/python uses that interpreter and its torch instead of making .venv.
set -euo pipefail
recipe=${1:-}
[ ! -f "$recipe" ] || recipe=$(readlink -f "$recipe") # as seen from the caller's folder, else from this one
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
case "${COMPLIANCE:-0}" in 0 | 1) ;; *) echo "COMPLIANCE=$COMPLIANCE: must be 0 or 1" >&2; exit 2 ;; esac
. ./setup.sh

unset_commands=$("$python" environment.py launcher)
eval "$unset_commands"
gpus=$("$python" environment.py gpus)
if [ -z "$recipe" ] && [ "$gpus" -eq 0 ]; then recipe=records/recipes/cpu_demo.env; fi
if [ -n "$recipe" ]; then
  exports=$("$python" recipes.py "$recipe") # a variable that the caller has set stays as it is
  eval "$exports"
fi

config=$("$python" train_gpt.py --print-config) # a wrong setting stops here, before any data is made
setting() { sed -n "s/^$1=//p" <<< "$config"; }
folder=$(setting DATASETS_DIR)
[ -n "$folder" ] || folder=$(setting DATA_DIR)/datasets/fineweb10B_sp$(setting VOCAB_SIZE)
published= pieces=()
folder=${folder%/}
case "${folder#./}" in
  data/demo) "$python" data/demo.py --out data/demo --vocab-size "$(setting VOCAB_SIZE)" ;;
  data/datasets/fineweb10B_sp8192) published=sp8192 ;;
  data/datasets/fineweb10B_sp8192_casefold_v2) published=casefold_v2 ;;
  data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved) published=caseops_v1 ;;
  data/datasets/fineweb10B_sp*_caseops_v3) pieces=(--superwords $(($(setting VOCAB_SIZE) / 256)) --join-digits) ;;
  data/datasets/fineweb10B_sp*_caseops_v3_words) pieces=(--superwords 0) ;;
  data/datasets/fineweb10B_sp*_caseops_v3_superwords) pieces=(--superwords $(($(setting VOCAB_SIZE) / 8))) ;;
  data/datasets/fineweb10B_sp*_caseops_v3_unigram) pieces=(--tokenizer-model unigram) ;;
esac
if [ -n "$published" ] && [ ! -d "$folder" ]; then
  "$python" data/download.py "$published" # about 16 GB
elif [ -n "$published" ] && [ ! -f "$folder/manifest.json" ]; then
  echo "warning: $folder has no manifest.json; if its download was cut off, ./data/download.py $published goes on" >&2
fi
if [ ${#pieces[@]} -gt 0 ] && [ ! -f "$folder/proof.json" ]; then
  # Hours, which need no GPU: the same command makes it elsewhere first. It goes on where it was stopped.
  "$python" data/prepare.py hub:docs --out "$folder" --transform caseops_v3 --vocab-size "$(setting VOCAB_SIZE)" \
    "${pieces[@]}" --prove
fi

out=$(setting OUT_DIR)
told=$(mkdir -p "$out" 2>/dev/null && mktemp "$(cd "$out" && pwd)/.run.XXXXXX") ||
  { echo "OUT_DIR=$out: cannot be written; set OUT_DIR to a writable folder" >&2; exit 2; }
trap 'rm -f "$told"; kill $(jobs -p) 2>/dev/null || true' EXIT
export RUN_FOLDER_FILE=$told # the trainer writes there which folder is its own: "started FOLDER", "scored FOLDER"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # idle threads that spin starve a machine that is shared
tracker=
if [ "${TRACKER:-none}" != none ]; then
  "$python" track.py & # beside the run: it reads the same file, and ends with the run
  tracker=$!
fi
launch=("$python" train_gpt.py) # one process needs no launcher: a plain error message and a plain kill
[ "$gpus" -le 1 ] ||
  launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt.py)
if setpriv --pdeathsig KILL true 2>/dev/null; then # it must not outlive this script
  launch=(setpriv --pdeathsig KILL "${launch[@]}")
fi
status=0
"${launch[@]}" &
wait $! || status=$?

state= folder=
read -r state folder < "$told" || true
unset RUN_FOLDER_FILE # what the probes start is another run
if [ "$status" -eq 0 ] && [ "$state" = scored ]; then
  if [ "${COMPLIANCE:-0}" = 1 ]; then "$python" compliance.py "$folder" || status=$?; fi
  "$python" report.py "$folder" || status=$?
elif [ "$status" -eq 0 ] && [ -z "$state" ]; then
  echo "run.sh: the run has not said which folder it wrote (RUN_FOLDER_FILE); ./report.py FOLDER draws it" >&2
  status=1
fi
if [ -n "$tracker" ] && [ -n "$state" ]; then wait "$tracker" || true; fi # it sends what is left
exit "$status"
