# The other scripts source this file. It makes venv/ if it is missing and installs the packages of requirements.txt.
# PYTHON names the interpreter, and CONSTRAINTS a file that limits the versions of the packages (pip's --constraint).
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat requirements.txt ${CONSTRAINTS:+"$CONSTRAINTS"})
if [ "$wanted" != "$(cat venv/.requirements-installed 2>/dev/null)" ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python is older than 3.10; name a newer one with PYTHON=..." >&2
        exit 2
    fi
    [ -x venv/bin/python ] || "$python" -m venv venv
    echo "installing requirements.txt into venv/ (torch is large: this can take minutes)"
    venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -r requirements.txt ${CONSTRAINTS:+--constraint "$CONSTRAINTS"}
    echo "$wanted" >venv/.requirements-installed
fi
