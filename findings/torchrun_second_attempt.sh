#!/usr/bin/env bash
# torch 2.13.0: after a worker died, torchrun starts the workers again, and in some of these attempts
# they get no gloo process group: the worker that is a moment earlier finds addresses of the attempt
# before in the store, and may wait for a process that is gone until the timeout. Whether it does
# depends on the port numbers. With a prefix of the store for each attempt, all attempts get theirs.
# Expected: every attempt gets its group.
# Seen:
#   default store, attempts of 6 that got a group: 4
#   prefix store, attempts of 6 that got a group: 6
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > worker.py <<'PY'
import datetime, os, sys, time
import torch, torch.distributed as dist

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"])
options = {"timeout": datetime.timedelta(seconds=5)}
if sys.argv[1] == "prefix":
    store, rank, world_size = next(dist.rendezvous("env://", **options))
    options |= {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world_size}
time.sleep(rank)  # workers never start at exactly the same time
try:
    dist.init_process_group("gloo", **options)
except RuntimeError:
    sys.exit(1)
dist.all_reduce(torch.ones(1))
if rank == 0:
    print("attempt", attempt, flush=True)
time.sleep(rank)
sys.exit(rank)
PY
for store in default prefix; do
  timeout 150 "$folder/venv/bin/torchrun" --nproc-per-node 2 --max-restarts 5 --standalone \
    worker.py $store >$store.txt 2>errors.txt || true
  echo "$store store, attempts of 6 that got a group: $(wc -l <$store.txt)"
done
test "$(wc -l <default.txt)" -lt 6
test "$(wc -l <prefix.txt)" -eq 6
