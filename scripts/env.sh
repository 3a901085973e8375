# Sourced by the other scripts: `source scripts/env.sh REQUIREMENTS` makes .venv if there is none, installs
# what the file asks for unless that was done before, and activates it. PYTHON names another interpreter.
requirements=$1
python=${PYTHON:-python3}
if [ ! -x .venv/bin/pip ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: rawgpt needs Python 3.10 or newer; set PYTHON=/path/to/one" >&2
        exit 2
    }
    rm -rf .venv
    "$python" -m venv .venv || {
        echo "error: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi
# The stamp names the requirements that were installed, by content.
stamp=.venv/installed-$(cat requirements-gpu.txt "$requirements" | cksum | tr ' ' -)
if [ ! -f "$stamp" ]; then
    echo "installing $requirements into .venv (a minute or two) ..."
    .venv/bin/pip install -qq --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
source .venv/bin/activate
