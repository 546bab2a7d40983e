#!/usr/bin/env bash
# Lint, check the formatting and the types, run the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

venv/bin/ruff check .
venv/bin/ruff format --check .
# The types are those of the newest versions of the libraries; the lowest, which CONSTRAINTS asks for, have others.
[ -n "${CONSTRAINTS:-}" ] || venv/bin/python -m mypy
# One process for each core, and one thread in each: the tests are many and their networks tiny.
export OMP_NUM_THREADS=1
venv/bin/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
