#!/usr/bin/env bash
# Lint, check the formatting and the types, run the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

venv/bin/ruff check .
venv/bin/ruff format --check .
[ -n "${CONSTRAINTS:-}" ] || venv/bin/mypy # the types are those of the newest versions, see pyproject.toml
venv/bin/python -m pytest tests "$@"
