#!/bin/sh
# Install pyproject.toml's dependencies into a fresh environment and write down what came: lock.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}

echo "lock: resolving pyproject.toml in .venv-lock"
"$python" -m venv --clear .venv-lock
.venv-lock/bin/python -m pip install -qq --disable-pip-version-check -e ".[dev]"

# A local version such as +cpu names a build that only some indexes have.
pins=$(.venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude drs |
    sed 's/+[A-Za-z0-9.]*$//' | grep -Ev '^(nvidia|cuda)-|^triton=')
case $pins in
    *' @ '*) echo "error: a package came from a file or URL, which is no exact pin" >&2; exit 1 ;;
esac

cat >requirements.lock.tmp <<END
# Exact versions of everything that is installed, for Python 3.11 and 3.12 on Linux. Written by \`make lock\`, which
# installs pyproject.toml with its dev extra into a fresh environment and lists what came; do not edit by hand.
# Not listed: the CUDA libraries (nvidia-*, cuda-*, triton). A CUDA build of torch names them in its own metadata, all
# but one with exact versions, and a CPU build needs none, so that this one file serves both.
$pins
END
cat >environment.yml.tmp <<END
# For conda users: conda env create -f environment.yml && conda activate drs
# Written by \`make lock\` together with requirements.lock, with the same pins; do not edit by hand.
name: drs
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
$(echo "$pins" | sed 's/^/      - /')
      - -e .
END
mv requirements.lock.tmp requirements.lock
mv environment.yml.tmp environment.yml
rm -rf .venv-lock
echo "lock: wrote requirements.lock and environment.yml ($(echo "$pins" | wc -l | tr -d ' ') pins)"
