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

# start_slurm: starts a controller for a partition of two imaginary nodes; the end of the script stops it.
start_slurm() {
  for command in slurmctld sbatch scontrol; do
    command -v "$command" >/dev/null || { echo "$command is not installed (apt-get install slurmctld slurm-client)"; exit 1; }
  done
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  mkdir state
  touch plugstack.conf
  cat > slurm.conf <<CONF
ClusterName=finding
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
AuthType=auth/none
CredType=cred/none
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/controller.log
SlurmctldPidFile=$folder/controller.pid
PlugStackConfig=$folder/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node[1-2] NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 State=CLOUD
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
EnforcePartLimits=ALL
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -D -f "$SLURM_CONF" >controller.out 2>&1 &
  controller=$!
  for _ in $(seq 100); do
    scontrol ping 2>/dev/null | grep -q UP && break
    sleep 0.1
  done
}
