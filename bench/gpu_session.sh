#!/usr/bin/env bash
# Everything about a GPU in one go, ten minutes at most:  bench/gpu_session.sh [DATASET]
# Builds the CUTLASS library if nvcc and its wheel are here, runs tests/gpu, runs bench/gpu.py --record, and trains the
# flagship and pr1693 on equally many tokens of DATASET (a folder of shards; without: the demo corpus), the table last.
# PYTHON names the interpreter (python3), OUT the folder of logs and tables (runs/gpu_session), STEPS and TOKENS the size
# of the comparison, LIMIT the seconds in total. DRY=1 tries the script at a small size on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-570} steps=${STEPS:-200} data=${1:-data/demo}
results=${OUT:-runs/gpu_session}
mkdir -p "$results" || exit 2
left() { echo $((limit - SECONDS)); }
say() { printf '\n== %s (%ds of %ds)\n' "$1" "$SECONDS" "$limit"; }
part() { # part SECONDS COMMAND...: the command, stopped after SECONDS or when the time is up; its status
  local most=$(($1 < $(left) ? $1 : $(left)))
  shift
  if [ "$most" -lt 10 ]; then echo "skipped, no time left: $*"; return 0; fi
  timeout --kill-after=5 "$most" "$@"
}
status=0 built= runs=()
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || [ -n "${DRY:-}" ] ||
  { echo "gpu_session.sh: there is no GPU for $python (torch.cuda.is_available() is False)" >&2; exit 2; }

{
  say "CUTLASS library"
  if ! command -v nvcc >/dev/null && [ -z "${CUDA_HOME:-}" ]; then
    echo "skipped: there is no nvcc"
  elif ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("cutlass_library") is None)'; then
    echo "skipped: the wheel nvidia-cutlass is not installed"
  else
    part 200 "$python" cutlass_evt_fusion/build.py > "$results/cutlass_build.log" 2>&1 & built=$!
    echo "building beside the tests that do not need it"
  fi

  say "data of the comparison"
  if [ "$data" = data/demo ] && [ ! -f data/demo/manifest.json ]; then
    part 120 "$python" data/demo.py --out data/demo > "$results/demo.log" 2>&1 & demo=$!
    echo "making data/demo beside the tests"
  fi

  say "tests/gpu"
  part 200 "$python" -m pytest tests/gpu ${DRY:+--dry} -k 'not cutlass' -rs || status=1
  [ -z "$built" ] || { wait "$built" || status=1; tail -n 4 "$results/cutlass_build.log"; }
  part 60 "$python" -m pytest tests/gpu ${DRY:+--dry} -k cutlass -rs || status=1
  [ -z "${demo:-}" ] || wait "$demo" || { tail -n 2 "$results/demo.log"; status=1; }

  say "bench/gpu.py"
  most=$(($(left) - 170)) # for the comparison
  part $((most + 30)) "$python" bench/gpu.py --budget "$((most > 60 ? most : 60))" \
    ${DRY:+--device cpu --tiny --quick} $([ -n "${DRY:-}" ] || echo --record) > "$results/gpu.log" 2>&1 || status=1
  grep -v '^RESULT ' "$results/gpu.log"
  cp records/gpu_checks.md "$results/"

  say "training on equally many tokens"
  export STAGE=train OUT_DIR="$results/runs" SCHEDULE=steps ITERATIONS=$steps VAL_LOSS_EVERY=$steps WARMUP_STEPS=0 \
    ENABLE_LOOPING_AT=0 MAX_WALLCLOCK_SECONDS=100000 TRAIN_LOG_EVERY=50 CHECKPOINT_EVERY=0 COMPRESSOR=lzma \
    MUON_MOMENTUM_WARMUP_STEPS=50 EMA_DECAY=0.98 LOADER=shuffled TRAIN_BATCH_TOKENS=${TOKENS:-98304} \
    MICRO_BATCH_TOKENS=49152     DATASETS_DIR=$data TOKENIZER_PATH=
  [ "$data" != data/demo ] || export VOCAB_SIZE=1024
  [ -z "${DRY:-}" ] || export TRAIN_SEQ_LEN=128 EVAL_SEQ_LEN=128 NUM_LAYERS=4 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 \
    XSA_LAST_N=4 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 VAL_BATCH_TOKENS=65536
  for name in flagship pr1693; do # both at once: most of the time goes into compiling, and only losses are compared
    (
      recipe=records/recipes/$name.env
      exports=$([ ! -f "$recipe" ] || "$python" recipes.py "$recipe") || exit 2
      eval "$exports"
      RUN_ID=$name part "$(left)" "$python" train_gpt.py > "$results/$name.log" 2>&1
    ) &
    runs+=($!)
  done
  for run in "${runs[@]}"; do wait "$run" || status=1; done
  printf '\n%s\n' "Training, $steps steps of $TRAIN_BATCH_TOKENS tokens, loops on, plain windows, $data:"
  printf '%-12s%12s%12s%12s\n' recipe val_loss val_bpb seconds
  for name in flagship pr1693; do
    read -r loss bpb < <(sed -nE 's/^val:step[0-9]+ val_loss:(\S+) val_bpb:(\S+).*/\1 \2/p' "$results/$name.log" | tail -n 1)
    taken=$(sed -nE 's/^train: [0-9]+ steps in (\S+)s.*/\1/p' "$results/$name.log")
    printf '%-12s%12s%12s%12s\n' "$name" "${loss:--}" "${bpb:--}" "${taken:-failed}"
    [ -n "$taken" ] || { status=1; tail -n 2 "$results/$name.log"; }
  done
  rm -rf "$results/runs" # checkpoints
  echo "status $status after ${SECONDS}s; results in $results"
  exit $status
} 2>&1 | tee "$results/session.log"
exit "${PIPESTATUS[0]}"
