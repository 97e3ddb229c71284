#!/usr/bin/env bash
# SLURM 22.05.8 (Debian 12): a job that is requeued while one of its nodes does not answer starts again as soon as that
# node is declared down, but without its GPUs. The controller still has the request, and refuses every step of srun.
# A batch script that handles a dead node by `scontrol requeue` meets this every time.
# Expected: the GPUs of the request, as in the first start.
# Seen:
#   slurm-wlm 22.05.8
#   start 0: GRES=gpu:1(IDX:0), request gres:gpu:1: the step ran
#   start 1: GRES=, request gres:gpu:1: srun: error: Unable to create step for job 1: Invalid generic resource (gres) specification
. "$(dirname "$0")/common.sh"
start_slurm node1 node2 node3

cat > job.sh <<'JOB'
#!/bin/bash
srun --nodes=2 --ntasks=2 true 2>step.txt && echo "the step ran" >step.txt
job=$(scontrol --detail show job "$SLURM_JOB_ID")
gres=$(sed -n 's/^ *Nodes=.* GRES=/GRES=/p' <<<"$job")
echo "start ${SLURM_RESTART_COUNT:-0}: $gres, request $(sed -n 's/.*TresPerNode=//p' <<<"$job"): $(cat step.txt)" >> starts.txt
sleep 60
JOB
wait_for_start() { wait_until "grep -q '^start $1' starts.txt"; }

sbatch --version
touch starts.txt
job=$(sbatch --parsable --requeue --nodes=2 --gpus-per-node=1 --output=job.log job.sh)
wait_for_start 0
kill -KILL "${daemons[node2]}"
wait "${daemons[node2]}" 2>killed.txt || true
scontrol requeue "$job"
sleep 2 # node1 has ended the job; node2 does not answer
scontrol update NodeName=node2 State=DOWN Reason=died # as SLURM does after its SlurmdTimeout
wait_for_start 1
scancel "$job"
wait_until "test -z \"\$(squeue --noheader)\""
cat starts.txt
test "$(sed 's/.*: //' starts.txt | paste -sd '|')" = "the step ran|Invalid generic resource (gres) specification"
