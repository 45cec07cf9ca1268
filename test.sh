#!/usr/bin/env bash
# The CPU test suite and the linter:  ./test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # as in run.sh
ruff check .
exec python -m pytest --ignore=tests/gpu "$@"
