#!/usr/bin/env bash
# Sets up the environment once, then runs the notebooks or, with `test`, the tests: see ./run_all.sh --help
# PYTHON=... chooses the interpreter. An active environment that already has erasekit from here is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-$(command -v python3 || command -v python || echo python3)}
stamp=.venv/set-up log=.venv/setup.log
# The folder is part of the stamp, since an environment does not survive being moved.
wanted="$PWD $(cat requirements.txt pyproject.toml | cksum)"

has_erasekit() { # -P: found because it is installed, not because this is its folder
    "$1" -P - 2>/dev/null <<'END'
import importlib.util, os, sys
spec = [importlib.util.find_spec(name) for name in ("erasekit", "papermill", "nbval")]
sys.exit(not all(spec) or not os.path.samefile(os.path.dirname(spec[0].origin), "erasekit"))
END
}

progress() { # pip's output -> a bar: packages found on the left, then packages installed
    local line percent=0 found=0 total=0 installed width=40 bar
    while :; do
        if IFS= read -r -t 1 line; then
            case $line in
            Collecting*) found=$((found + 1)) ;;
            "Installing collected packages"*) line=${line//[^,]/} total=$((${#line} + 1)) ;;
            esac
        elif [ $? -le 128 ]; then # the end, not the timeout
            break
        fi
        percent=$((found * 70 / 190)) # about 190 packages; only pip's resolver knows
        [ $percent -le 70 ] || percent=70
        if [ $total -gt 0 ]; then
            installed=$(find .venv/lib -maxdepth 3 -name '*.dist-info' | wc -l)
            percent=$((70 + installed * 29 / total))
            [ $percent -le 99 ] || percent=99
        fi
        [ -t 2 ] || continue
        bar=$(printf "%*s" $((percent * width / 100)) "")
        printf "\r  [%-${width}s] %3d %%  %ds " "${bar// /#}" $percent $SECONDS >&2
    done
    [ ! -t 2 ] || printf "\r%70s\r" "" >&2
}

set_up() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "run_all: Python 3.11 or newer is needed and '$PYTHON' is not; name a newer one with PYTHON=..." >&2
        exit 2
    }
    echo "Setting up .venv with the packages of requirements.txt: once, some minutes and up to 6 GB."
    local clear=
    if [ "$(cat $stamp 2>/dev/null)" = unfinished ]; then clear=--clear; fi
    "$PYTHON" -m venv $clear .venv
    echo unfinished >$stamp
    local pip=(.venv/bin/python -u -m pip install --disable-pip-version-check --no-input --progress-bar off)
    "${pip[@]}" -r requirements.txt 2>&1 | tee $log | progress || {
        tail -n 25 $log >&2
        echo "run_all: the set-up failed as above; all of pip's output is in $log. The same command tries again." >&2
        exit 1
    }
    echo "$wanted" >$stamp
    echo "Set up in $SECONDS s."
}

if ! has_erasekit "$PYTHON"; then
    [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] || set_up
    PYTHON=.venv/bin/python
fi
# glibc otherwise returns large blocks to the system at every step: after half an hour of training that took two thirds of the time.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_TOP_PAD_=268435456
exec "$PYTHON" -m erasekit.tools.run_all "$@"
