#!/usr/bin/env bash
# SLURM 22.05.8 (Debian 12): `sbatch --test-only` exits with 0 and prints a start time for a job in a
# partition that is down, where no job starts. It refuses an unknown partition with 1.
# Expected: a refusal, or a line that says that the partition is down.
# Seen:
#   slurm-wlm 22.05.8
#   partition up: exit code 0: sbatch: Job 1 to start at TIME using 1 processors on nodes node1 in partition batch
#   State=DOWN
#   partition down: exit code 0: sbatch: Job 2 to start at TIME using 1 processors on nodes node1 in partition batch
#   partition unknown: exit code 1: allocation failure: Invalid partition name specified
. "$(dirname "$0")/common.sh"
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

ask() { # prints and sets the exit code of a test of a job in a partition
  code=0
  printf '#!/bin/sh\n' | sbatch --test-only --partition="$1" >answer.txt 2>&1 || code=$?
  echo "$2: exit code $code: $(tail -n 1 answer.txt | sed 's/ at .* using/ at TIME using/')"
}
sbatch --version
ask batch "partition up"
scontrol update PartitionName=batch State=DOWN
scontrol --oneliner show partition batch | grep -o 'State=[A-Z]*'
ask batch "partition down"
down=$code
ask other "partition unknown"
test "$down $code" = "0 1"
