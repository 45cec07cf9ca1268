# Sourced by run.sh and test.sh: the virtual environment .venv with requirements.txt, made once and remade when that file
# changes.
command -v python3 >/dev/null || { echo "python3 is missing; install Python 3.10 or newer" >&2; exit 2; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "$(python3 --version) is too old; install Python 3.10 or newer" >&2; exit 2; }
stamp=$(python3 - <<'PYTHON'
import hashlib, sys
print(hashlib.sha256(open("requirements.txt", "rb").read() + sys.version.encode()).hexdigest())
PYTHON
)
if [ "$(cat .venv/requirements.sha256 2>/dev/null)" != "$stamp" ]; then
  echo "setup: installing requirements.txt into .venv (once; a minute or two)"
  python3 -m venv --clear .venv ||
    { echo "python3 -m venv failed; install the venv module of your Python (Debian: apt install python3-venv)" >&2; exit 2; }
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.txt ||
    { echo "pip could not install requirements.txt; see its message above, then run this again" >&2; exit 2; }
  echo "$stamp" > .venv/requirements.sha256
fi
unset PYTHONDONTWRITEBYTECODE  # a run starts many processes: each would compile torch and numba again
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
