#!/usr/bin/env bash
# Measure what docs/results.md says, on this machine, and write it anew. Arguments: python -m experiments.results --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec venv/bin/python -m experiments.results "$@"
