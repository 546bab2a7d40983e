#!/usr/bin/env bash
# Repeats the measurement of docs/results.md on this machine and rewrites that page.
# Arguments: python -m experiments.results --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec venv/bin/python -m experiments.results "$@"
