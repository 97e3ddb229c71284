#!/usr/bin/env bash
# SLURM 22.05.8 (Debian 12): sbatch makes another limit of a time of more than 2^31 seconds (24855 days),
# without an error or a warning. A large number that stands for "no limit" may become one minute.
# Expected: a refusal, or the longest limit that SLURM can hold.
# Seen:
#   slurm-wlm 22.05.8
#   --time=24855-0 gives 24855-00:00:00
#   --time=49711-0 gives 17:32:00
#   --time=71582789 gives 00:01:00
. "$(dirname "$0")/common.sh"
start_slurm

sbatch --version
for time in 24855-0 49711-0 71582789; do
  job=$(printf '#!/bin/sh\n' | sbatch --parsable --hold --time="$time" 2>errors.txt)
  test ! -s errors.txt # no warning
  echo "--time=$time gives $(scontrol show job "$job" | sed -n "s,.* TimeLimit=\([^ ]*\).*,\1,p")"
done | tee limits.txt
test "$(sed 's/.* gives //' limits.txt | paste -sd ' ')" = "24855-00:00:00 17:32:00 00:01:00"
