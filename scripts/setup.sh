#!/bin/sh
# Make .venv hold just requirements.lock and this package: setup.sh PYTHON [GOALS]. Does nothing where it does already,
# and says so only where setup itself is a goal of make.
set -eu
cd "$(dirname "$0")/.."
python=$1
goals=${2:-}
stamp=.venv/installed

# What .venv was made from. The folder belongs to it: scripts of a virtual environment hold its absolute path.
wanted() {
    pwd
    cat requirements.lock pyproject.toml
}

if [ -f "$stamp" ] && wanted | cmp -s - "$stamp" && .venv/bin/python -c '' 2>/dev/null; then
    case " $goals " in *" setup "*) echo "setup: .venv is up to date ($(.venv/bin/python --version))" ;; esac
    exit 0
fi

if [ -L .venv ]; then
    echo "error: .venv is a link to $(readlink .venv), which making it anew would empty; remove the link first" >&2
    exit 2
fi

version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) || version="not found"
case $version in
    3.11 | 3.12) ;;
    *)
        echo "error: PYTHON=$python is $version, but 3.11 or 3.12 is needed; for example: make setup PYTHON=python3.12" >&2
        exit 2
        ;;
esac

count=$(grep -c '==' requirements.lock)
echo "setup: installing $count packages into .venv (Python $version); this takes a few minutes the first time"
rm -f "$stamp"
"$python" -m venv --clear .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.lock
# On all cores, which pip does not use. A few files are templates or for other versions of Python, and do not compile.
.venv/bin/python -m compileall -qq -j 0 .venv/lib drs scripts >/dev/null 2>&1 || true
# setuptools is in the lock, so that nothing needs to be fetched to build the package.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
wanted >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
echo "setup: .venv is ready"
