#!/usr/bin/env bash
# Measures on one GPU what a first hour there has to show, in at most 12 minutes.
#
#     tests/gpu/first_hour.sh [FOLDER [PARTS]]
#
# Every part has a time limit, and the next one starts whatever became of it. FOLDER (default
# runs/first-hour) gets a record for each run, a log for each part, README.md with a line for each
# part, and RESULTS.md, the report of all runs. PARTS is a regular expression of parts to run.
#
# MODE=plan prints the parts, their limits in seconds and their commands. MODE=tiny trains tiny
# models on the CPU instead. PYTHON names the interpreter (default .venv/bin/python), LIMIT_S the
# seconds for all parts, after which the report has 30.
set -u
cd "$(dirname "$0")/../.." || exit 1
folder=${1:-runs/first-hour} parts=${2:-.} mode=${MODE:-gpu} python=${PYTHON:-.venv/bin/python}
readonly LIMIT_S=${LIMIT_S:-680}

common=(--devices 1 --precision bf16-mixed --max-steps 80 --validate-every 80
  --validation-batches 2 --log-every 20 --no-checkpoint --data synthetic)
size() { printf '%s\n' --size "$1" --batch-size "$2"; } # of a model
if [ "$mode" = tiny ]; then
  size() { printf '%s\n' --model.width 32 --model.num-layers 1 --model.num-heads 2 --batch-size 2; }
  common+=(--accelerator cpu --model.feedforward-width 32 --max-steps 20 --validate-every 20)
fi

finish() { # the report of all runs; the last thing that is left out if time is short
  timeout 30 "$python" -m scaling report "$folder/records" --out "$folder/RESULTS.md" \
    >"$folder/report.log" 2>&1 || echo "- no report: see report.log" >>"$folder/README.md"
  cat "$folder/README.md"
}

part() { # NAME SECONDS COMMAND...: runs one part and writes its line
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ $name =~ $parts ]] || return 0
  if [ "$mode" = plan ]; then
    printf '%s %s ' "$name" "$limit"
    printf '%q ' "$@"
    echo
    return
  fi
  [ "$mode" = tiny ] && limit=$((4 * limit)) # on a busy machine
  ((limit > LIMIT_S - SECONDS)) && limit=$((LIMIT_S - SECONDS))
  if ((limit < 10)); then
    echo "- $name: left out, no time" >>"$folder/README.md"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1
  status=$?
  case $status in
    0) status=ok ;;
    124 | 137) status="stopped after $limit s" ;;
    *) status="failed with $status" ;;
  esac
  echo "- $name: $status, $((SECONDS - start)) s; $(say "$folder/$name.log")" >>"$folder/README.md"
}

say() { # what a log ends with: the results of a run, of the tests, or an error
  { grep -E '^(speed|work|memory|caution|traced) |^error|passed|failed|^trace ' "$1" ||
    tail -n 1 "$1"; } | tail -n 5 | tr -s ' ' | paste -sd '|' | sed 's/|/ | /g'
}

train() { # NAME SECONDS RECIPE OPTIONS...
  local name=$1 limit=$2 recipe=$3
  shift 3
  part "$name" "$limit" "$python" -m "recipes.$recipe" "${common[@]}" "$@" \
    --out "$folder/runs" --record "$folder/records/$name.json"
}

model() { # NAME SECONDS RECIPE SIZE BATCH: without and with the compiler
  local shape
  mapfile -t shape < <(size "$4" "$5")
  train "$1" "$2" "$3" "${shape[@]}"
  train "$1-compiled" $(($2 + 30)) "$3" "${shape[@]}" --compile default
}

if [ "$mode" != plan ]; then
  mkdir -p "$folder/records"
  {
    echo "# First hour, $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD)"
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader || true
    "$python" -c 'import torch; print("torch", torch.__version__)'
    echo
  } >"$folder/README.md" 2>/dev/null
  trap finish EXIT
fi

if [ "$mode" != tiny ]; then
  part tests 180 "$python" -m pytest tests/gpu -q -m gpu -k 'not certificate' -p no:cacheprovider
fi
model gpt-reference 40 gpt reference 64
model gpt-124m 40 gpt 124m 16

# One rank, whose weights, gradients and optimizer states are in host memory.
offload=(--cpu-offload)
[ "$mode" = tiny ] && offload=()
mapfile -t shape < <(size 124m 16)
for strategy in fsdp zero2 zero3; do
  train "offload-$strategy" 45 gpt "${shape[@]}" --strategy "$strategy" "${offload[@]}"
done

train trace 45 gpt "${shape[@]}" --trace "$folder/trace"
part trace-against-clock 10 "$python" -c '
import json, statistics, sys
record = json.load(open(sys.argv[1]))
trace, step_s = record["trace"][0], statistics.median(record["step_s"])
traced_s = sum(row["s_per_step"] for row in trace["rows"])
print(f"trace {1e3 * traced_s:.1f} ms per step, clock {1e3 * step_s:.1f} ms, "
      f"ratio {traced_s / step_s:.2f} (1 to 1.3 is right)")
' "$folder/records/trace.json"

# Checkpoints are written by a thread: no process may use another amount of memory than before.
if [ "$mode" = gpu ] && [[ checkpoints =~ $parts ]]; then
  nvidia-smi --query-compute-apps=timestamp,pid,used_memory --format=csv,noheader \
    --loop-ms=500 >"$folder/memory.csv" 2>&1 &
  watcher=$!
fi
train checkpoints 45 gpt "${shape[@]}" --strategy fsdp --no-checkpoint false --checkpoint-every 5 \
  --checkpoint-dir "$folder/checkpoints"
if [ -n "${watcher-}" ]; then
  kill "$watcher" 2>/dev/null
  echo "- memory by process, first and last: $(awk -F', ' '
    !($2 in first) { first[$2] = $3 } { last[$2] = $3 }
    END { for (pid in first) printf "%s %s %s; ", pid, first[pid], last[pid] }' \
    "$folder/memory.csv")" >>"$folder/README.md"
fi
rm -rf "$folder/checkpoints"

model bert-large 40 bert large 32
model vit-l 40 vit l 64
model gpt-1.3b 60 gpt 1.3b 8
if [ "$mode" != tiny ]; then
  part certificates 200 "$python" -m pytest tests/gpu -q -k certificate -p no:cacheprovider
fi
