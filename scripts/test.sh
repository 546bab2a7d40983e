#!/usr/bin/env bash
# Lint, check the formatting, run the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

venv/bin/ruff check .
venv/bin/ruff format --check .
venv/bin/python -m pytest tests "$@"
