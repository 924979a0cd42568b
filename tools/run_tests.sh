#!/usr/bin/env bash
# Everything this machine can check: environment, lint, format, tests. Arguments go to pytest.
#   bash tools/run_tests.sh [-k cpu ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh requirements.txt requirements-dev.txt

failed=()
check() {
  echo "== $*"
  "$@" || failed+=("$*")
}

check .venv/bin/ruff check .
check .venv/bin/ruff format --check .
# Two files at a time, in the order of tests/conftest.py: the longest first.
check .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all checks passed: lint, format, tests"
