# Sourced by each script: makes a temporary folder, which the end of the script removes.
set -euo pipefail
unset PYTHONPATH
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore OMP_NUM_THREADS=2
folder=$(mktemp -d)
export TMPDIR=$folder  # for what packages leave in a temporary folder
declare -A daemons  # of SLURM, by name
finish() {
  code=$?
  for daemon in "${daemons[@]}"; do
    kill -KILL "$daemon" && wait "$daemon" || true
  done 2>daemons.txt
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

# install_deepspeed NAME==VERSION...: installs packages and DeepSpeed, which is built against the torch that is there.
install_deepspeed() {
  others=()
  for package; do
    case $package in deepspeed==*) deepspeed=$package ;; *) others+=("$package") ;; esac
  done
  install setuptools==80.9.0 wheel==0.45.1 "${others[@]}"
  "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile --no-build-isolation "$deepspeed"
}

# run_deepspeed FILE ARGUMENT...: runs a script as the only rank; shows what it prints, but not DeepSpeed's own log.
run_deepspeed() {
  if ! MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 \
    timeout 120 "$python" "$@" >printed.txt 2>errors.txt; then
    tail -n 3 printed.txt errors.txt
    return 1
  fi
  grep -v '^\[' printed.txt
}

# start_slurm [NODE...]: starts a controller, and nodes of these names with a GPU each on this machine; without
# names there are two imaginary nodes. The end of the script stops all.
start_slurm() {
  for command in slurmctld sbatch scontrol ${1:+slurmd srun}; do
    command -v "$command" >/dev/null || { echo "$command is not installed (apt-get install slurmctld slurmd slurm-client)"; exit 1; }
  done
  shape="NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000"
  host=$(hostname -s)
  mkdir state
  touch plugstack.conf
  echo CgroupPlugin=cgroup/v1 > cgroup.conf
  cat > slurm.conf <<CONF
ClusterName=finding
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/none
CredType=cred/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/%n.log
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/%n.pid
PlugStackConfig=$folder/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=1
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
EnforcePartLimits=ALL
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  if [ $# = 0 ]; then
    printf '%s\n' "NodeName=node[1-2] $shape State=CLOUD" SuspendProgram=/bin/true ResumeProgram=/bin/true \
      SuspendTime=600 >> slurm.conf
  else
    echo GresTypes=gpu >> slurm.conf
    for node in "$@"; do
      ln -s /dev/null "gpu-$node"
      echo "NodeName=$node NodeHostname=$host Port=$(free_port) $shape Gres=gpu:1 State=UNKNOWN" >> slurm.conf
      echo "NodeName=$node Name=gpu File=$folder/gpu-$node" >> gres.conf
    done
  fi
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -D -f "$SLURM_CONF" >controller.out 2>&1 &
  daemons[controller]=$!
  wait_until "scontrol ping 2>/dev/null | grep -q UP"
  for node in "$@"; do start_node "$node"; done
}

start_node() {
  slurmd -D -N "$1" -f "$SLURM_CONF" >"$1.out" 2>&1 &
  daemons[$1]=$!
  wait_until "sinfo --noheader --Node --nodes=$1 --format=%T | grep -q '^idle$'"
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# wait_until COMMAND: runs a command until it succeeds, for at most a minute.
wait_until() {
  for _ in $(seq 300); do
    eval "$1" && return
    sleep 0.2
  done
  echo "waited in vain until $1" >&2
  return 1
}
