# Sourced by each script: makes a temporary folder, which the end of the script removes.
set -euo pipefail
unset PYTHONPATH
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore OMP_NUM_THREADS=2
folder=$(mktemp -d)
trap 'cd / && rm -rf "$folder"' EXIT
cd "$folder"
python=$folder/venv/bin/python

# install NAME==VERSION...: installs packages into a new virtual environment.
install() {
  "${PYTHON:-python3}" -m venv "$folder/venv"
  "$python" -m pip install --quiet --quiet --disable-pip-version-check \
    --no-compile --extra-index-url https://download.pytorch.org/whl/cpu "$@"
}
