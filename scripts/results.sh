#!/usr/bin/env bash
# Measure what docs/results.md says, on this machine, and write it anew. Arguments: scripts/results.py --help
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec venv/bin/python scripts/results.py "$@"
