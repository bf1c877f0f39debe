#!/bin/sh
# Make a virtual environment with pip in it, on a machine that has Python and nothing else.
#
#     sh scripts/bootstrap.sh FOLDER
#
# Takes the first Python 3.11 or later among python3.13, python3.12, python3.11 and python3, or
# the one that $PYTHON names. Does nothing when FOLDER is such an environment already. Debian's
# and Ubuntu's Python comes without ensurepip, so pip is fetched in whatever way this machine has.
set -eu

venv=${1:?usage: sh scripts/bootstrap.sh FOLDER}

fail() {
    echo "error: $*" >&2
    exit 1
}

# MLX has no build for Intel Macs, nor for a Python that runs translated on Apple silicon.
usable() {
    "$1" -c 'import platform, sys
translated = sys.platform == "darwin" and platform.machine() != "arm64"
sys.exit(sys.version_info < (3, 11) or translated)' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or later, or on a Mac no native one"
        echo "$PYTHON"
        return
    fi
    for name in python3.13 python3.12 python3.11 python3; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 or later found (on a Mac, a native Apple silicon one); install one, or name it: make PYTHON=/path/to/python3 ..."
}

has_pip() {
    "$venv/bin/python" -m pip --version
}

# Ways to put pip into $venv; each may fail.
by_ensurepip() { "$venv/bin/python" -m ensurepip; }
by_pip() { "$python" -m pip --python "$venv/bin/python" install pip; }
by_virtualenv() { "$python" -m virtualenv "$venv" || virtualenv --python "$python" "$venv"; }
by_uv() { uv pip install --python "$venv/bin/python" pip; }

add_pip() {
    for way in by_ensurepip by_pip by_virtualenv by_uv; do
        if "$way" >/dev/null 2>&1 && has_pip >/dev/null 2>&1; then
            return
        fi
    done
    return 1
}

remove_unfinished() {
    rm -rf "$venv"
    fail "$*"
}

if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
    fail "$venv is not a virtual environment; move it away, or name another folder: make VENV=..."
fi
if usable "$venv/bin/python" && has_pip >/dev/null 2>&1; then
    exit 0
fi

python=$(find_python)
echo "Making $venv with $("$python" --version)" >&2
trap 'remove_unfinished "interrupted"' INT TERM
if ! usable "$venv/bin/python"; then
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" ||
        remove_unfinished "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
fi
add_pip ||
    remove_unfinished "$python comes without pip; on Debian and Ubuntu: apt-get install python3-venv"
