# Sourced by run.sh and test.sh once they have changed to the repository's folder: $python becomes an interpreter
# that has requirements.txt. With PYTHON=/path/to/python it is that one, as it is: nothing is installed, and what it
# lacks is said in one line. Without, it is that of .venv, made once and remade when requirements.txt changes.
case "${PYTHON:-}" in
  /* | '') ;;
  */*) export PYTHON="$OLDPWD/$PYTHON" ;; # as seen from the caller's folder
esac
python=${PYTHON:-python3}
command -v "$python" >/dev/null ||
  { echo "$python is missing; install Python 3.10 or newer, or name one in PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "$("$python" --version 2>&1) is too old; install Python 3.10 or newer, or name one in PYTHON" >&2; exit 2; }

if [ -n "${PYTHON:-}" ]; then
  "$python" environment.py packages ${needs_tests:+tests} || exit 2
else
  stamp=$("$python" - <<'EOS'
import hashlib, sys
print(hashlib.sha256(open("requirements.txt", "rb").read() + sys.version.encode()).hexdigest())
EOS
  )
  if [ "$(cat .venv/requirements.sha256 2>/dev/null)" != "$stamp" ]; then
    if [ -L .venv ]; then # to make it anew would empty the folder that it leads to
      echo "$PWD/.venv: a link to an environment of other requirements; remove the link, or name that Python in PYTHON" >&2
      exit 2
    fi
    echo "setup: installing requirements.txt into .venv (once; a minute or two)"
    "$python" -m venv --clear .venv ||
      { echo "$PWD/.venv: cannot be made; install the venv module (Debian: apt install python3-venv), make the" \
        "folder writable, or name a Python with requirements.txt in PYTHON" >&2; exit 2; }
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.txt ||
      { echo "pip could not install requirements.txt; see its message above, then run this again" >&2; exit 2; }
    echo "$stamp" > .venv/requirements.sha256 ||
      { echo "$PWD/.venv: cannot be written; free disk space and run this again" >&2; exit 2; }
  fi
  python=$PWD/.venv/bin/python
  export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
fi
unset PYTHONDONTWRITEBYTECODE # a run starts many processes: each would compile torch and numba again
