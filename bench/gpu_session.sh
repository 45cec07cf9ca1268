#!/usr/bin/env bash
# One of three calls on a machine with a GPU, each under ten minutes:  bench/gpu_session.sh 1|2|3 [OPTION...]
# What each does, and the options: bench/gpu_session.py --help. Before, where the text is:
#   bench/gpu_session.py carry web.jsonl.xz prose.jsonl.xz --val val.jsonl.xz --tokenizer fineweb_8192_bpe.model
# That fills runs/carried (38 MB), which must lie in the same place on the GPU's machine, beside the repository's
# files. For packages that the machine lacks and cannot fetch (pip's list: requirements.txt), put wheels into
# runs/carried/wheels first (pip download --no-deps). Run the calls one after the other while the machine is held:
# runs/gpu_session there has the logs, the dataset, the model and what is done. $OUT (or runs/gpu_session) gets
# tables_1.md to tables_3.md; bench/gpu_session.py record tables_1.md ... appends them to records/gpu_checks.md.
# PYTHON names the interpreter (python3), which must have torch for CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=(runs/carried/wheels/*.whl)
[ ! -e "${wheels[0]}" ] || "$python" -m pip install --quiet --no-index --no-deps "${wheels[@]}"
export PYTHON="$python" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/runs/gpu_session/inductor}"
exec "$python" bench/gpu_session.py "$@"
