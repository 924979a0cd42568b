#!/usr/bin/env bash
# Makes .venv with the packages of the given requirements files (from requirements.txt on), or finds it ready.
#   bash tools/setup_env.sh [requirements.txt [more.txt ...]]      PYTHON=python3.12 chooses the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'

choose_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$name" >/dev/null && "$name" -c "$supported" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
}

files=("$@")
[ ${#files[@]} -gt 0 ] || files=(requirements.txt)
for file in "${files[@]}"; do
  [ -f "$file" ] || fail "$file is not there; this script takes requirements files of the repository"
done

venv_python=.venv/bin/python
if [ -e .venv ] && ! "$venv_python" -c "$supported" 2>/dev/null; then
  fail ".venv is there, but its Python does not run or is not 3.10 to 3.13: remove .venv and start again"
fi

if [ ! -e .venv ]; then
  python=$(choose_python)
  if [ -z "$python" ]; then
    fail "no Python 3.10 to 3.13 found (python3 is $(python3 --version 2>/dev/null || echo absent)): install one, or name it: PYTHON=/path/to/python3.12 bash $0"
  fi
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    fail "$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
  fi
  echo "environment: making .venv with $("$python" --version)"
  "$python" -m venv .venv || { rm -rf .venv; fail "$python could not make .venv (see above)"; }
fi

# The stamp holds the hash of every list that is installed, so each list is installed once and again when it changes.
stamps=.venv/installed
mkdir -p "$stamps"
for file in "${files[@]}"; do
  hash=$("$venv_python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
  stamp="$stamps/$(basename "$file").sha256"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
    echo "environment: $file is installed in .venv"
    continue
  fi
  "$venv_python" -m pip --version >/dev/null || fail ".venv has no pip (a run killed while making it?): remove .venv and start again"
  # --no-compile: Python compiles a module when it is first imported, and most of these 14,000 files never are.
  # torch first: the build of other packages looks for it.
  torch=$(grep -E '^torch([=<>~! ]|$)' "$file" || true)
  if [ -n "$torch" ]; then
    echo "environment: installing $torch (the first time, minutes)"
    "$venv_python" -m pip install --quiet --no-compile "$torch"
  fi
  echo "environment: installing $file"
  "$venv_python" -m pip install --quiet --no-compile -r "$file"
  echo "$hash" >"$stamp"
done
