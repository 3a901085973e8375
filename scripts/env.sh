# Sourced by the other scripts: `source scripts/env.sh REQUIREMENTS`. Makes .venv if there is none, installs the
# requirements file into it unless that was done before, and activates it. PYTHON names another interpreter.
# An existing .venv is used as it is, whatever made it, and is never deleted.
requirements=$1
fail() { echo "error: $*" >&2; exit 2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }

# An environment of this script that was interrupted while being made is the only one that is removed.
unfinished=.venv/unfinished-by-env.sh
[ ! -f "$unfinished" ] || rm -rf .venv

if [ ! -e .venv ] && [ ! -L .venv ]; then
    recent "${PYTHON:-python3}" || fail "rawgpt needs Python 3.10 or newer; set PYTHON=/path/to/python"
    mkdir .venv && touch "$unfinished"
    "${PYTHON:-python3}" -m venv .venv || {
        rm -rf .venv
        fail "python -m venv could not make .venv; on Debian and Ubuntu: apt install python3-venv"
    }
    rm "$unfinished"
fi
[ -x .venv/bin/python ] || fail ".venv is not a usable virtual environment (no bin/python); move it away or delete it"
recent .venv/bin/python || fail ".venv has a Python older than 3.10; move it away, or upgrade it"

# The stamp names the requirements that were installed, by content.
stamp=.venv/installed-$(cat requirements-gpu.txt "$requirements" | cksum | tr ' ' -)
if [ ! -f "$stamp" ]; then
    echo "installing $requirements into .venv (a minute or two) ..."
    options=(-r "$requirements")
    .venv/bin/python -c 'import importlib.metadata; importlib.metadata.version("torch")' 2> /dev/null ||
        options+=(-c scripts/constraints.txt)
    # uv makes environments without pip: install with uv, or add pip.
    if .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null 2>&1; then
        .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check "${options[@]}"
        # pip would compile on one core. Some packages contain files that are not Python 3.
        .venv/bin/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib > /dev/null 2>&1 || true
    elif command -v uv > /dev/null; then
        uv pip install --quiet --python .venv/bin/python "${options[@]}"
    else
        fail ".venv has no pip, and neither ensurepip nor uv can install it; add pip to .venv, or move .venv away"
    fi
    touch "$stamp"
fi
source .venv/bin/activate
