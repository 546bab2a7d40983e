#!/usr/bin/env bash
# Lints, checks the formatting and the types, and runs the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

venv/bin/ruff check .
venv/bin/ruff format --check .
# The types fit the newest versions of the libraries; with older ones, which CONSTRAINTS may choose, mypy is skipped.
[ -n "${CONSTRAINTS:-}" ] || venv/bin/python -m mypy
# One process per core, with one thread each: there are many tests, and their networks are tiny.
export OMP_NUM_THREADS=1
venv/bin/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
