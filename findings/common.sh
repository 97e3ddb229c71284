# Sourced by each script: makes a temporary folder, which the end of the script removes.
set -euo pipefail
unset PYTHONPATH
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore OMP_NUM_THREADS=2
folder=$(mktemp -d)
export TMPDIR=$folder  # for what packages leave in a temporary folder
controller=
finish() {
  code=$?
  [ -z "$controller" ] || { kill "$controller"; wait "$controller" || true; }
  cd / && rm -rf "$folder"
  [ "$code" = 0 ] && return
  echo "not as stated: the behaviour has changed, or something is not installed" >&2
  exit 1
}
trap finish EXIT
cd "$folder"
python=$folder/venv/bin/python

# install NAME==VERSION...: installs packages into a new virtual environment.
install() {
  "${PYTHON:-python3}" -m venv "$folder/venv"
  # The other index has builds of torch without CUDA.
  case "$*" in *torch==*) set -- --extra-index-url https://download.pytorch.org/whl/cpu "$@" ;; esac
  "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile --retries 1 "$@"
}
