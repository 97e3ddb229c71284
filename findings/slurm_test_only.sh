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
start_slurm

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
