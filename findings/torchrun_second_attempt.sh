#!/usr/bin/env bash
# torch 2.13.0: after a worker died, the second attempt of torchrun starts, and does not get its gloo
# process group if one worker is a moment later than the other: the earlier one finds the addresses of
# the first attempt in the store, and waits for a process that is gone until the timeout.
# With a prefix of the store for each attempt, both get their group.
# Expected: the second attempt trains.
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > worker.py <<'PY'
import datetime, os, sys, time
import torch, torch.distributed as dist

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"])
options = {"timeout": datetime.timedelta(seconds=10)}
if sys.argv[1] == "prefix":
    store, rank, world_size = next(dist.rendezvous("env://", **options))
    options |= {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world_size}
time.sleep(2 * rank)  # workers never start at exactly the same time
try:
    dist.init_process_group("gloo", **options)
except RuntimeError as error:
    print(f"attempt {attempt}, rank {rank}: no group within 10 s ({type(error).__name__})", flush=True)
    sys.exit(1)
dist.all_reduce(torch.ones(1))
print(f"attempt {attempt}, rank {rank}: has its group", flush=True)
sys.exit(1 if (attempt, rank) == ("0", 1) else 0)
PY
for store in default prefix; do
  timeout 120 "$folder/venv/bin/torchrun" --nproc-per-node 2 --max-restarts 1 --standalone \
    worker.py $store >out.txt 2>errors.txt || true
  sort out.txt | sed "s/^/$store store, /" | tee $store.txt
done
grep -q "attempt 0, rank 0: has its group" default.txt
grep -q "attempt 1, rank 0: no group" default.txt
grep -q "attempt 1, rank 0: has its group" prefix.txt
