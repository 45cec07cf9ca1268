#!/usr/bin/env bash
# The CPU test suite and the linter:  ./test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
needs_tests=1
. ./setup.sh
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # as in run.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one test per core instead
"$python" -m ruff format --check .
"$python" -m ruff check .
exec "$python" -m pytest --ignore=tests/gpu --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
