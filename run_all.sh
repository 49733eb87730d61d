#!/usr/bin/env bash
# Sets up the environment once, then runs the notebooks or, with `test`, the tests: see ./run_all.sh --help
# PYTHON=... chooses the interpreter. An active environment that already has erasekit from here is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-$(command -v python3 || command -v python || echo python3)}
stamp=.venv/set-up
# The folder is part of it, since an environment does not survive being moved.
wanted="$PWD $(cat environment.yml pyproject.toml | cksum)"

has_erasekit() { # -P: found because it is installed, not because we stand in its folder
    "$1" -P - 2>/dev/null <<'END'
import importlib.util, os, sys
spec = [importlib.util.find_spec(name) for name in ("erasekit", "papermill", "nbval")]
sys.exit(not all(spec) or not os.path.samefile(os.path.dirname(spec[0].origin), "erasekit"))
END
}

set_up() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "run_all: Python 3.11 or newer is needed and '$PYTHON' is not; name a newer one with PYTHON=..." >&2
        exit 2
    }
    echo "Setting up .venv with the packages that environment.yml pins: once, some minutes and up to 6 GB."
    local clear=
    if [ "$(cat $stamp 2>/dev/null)" = unfinished ]; then clear=--clear; fi
    "$PYTHON" -m venv $clear .venv
    echo unfinished >$stamp
    awk '/^ *- pip:/ { pip = 1; next } pip && sub(/^ *- /, "")' environment.yml >.venv/requirements.txt
    .venv/bin/python -m pip install --disable-pip-version-check --no-input -r .venv/requirements.txt
    echo "$wanted" >$stamp
}

if ! has_erasekit "$PYTHON"; then
    [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] || set_up
    PYTHON=.venv/bin/python
fi
# glibc otherwise gives large blocks back to the system at every step: after half an hour of training that took two thirds of the time.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_TOP_PAD_=268435456
exec "$PYTHON" -m erasekit.runner "$@"
