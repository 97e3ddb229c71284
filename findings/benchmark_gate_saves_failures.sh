#!/usr/bin/env bash
# pytest-benchmark 5.3.1: with --benchmark-autosave beside --benchmark-compare-fail, the run that fails
# the gate is saved, becomes the base of the next comparison, and the same command passes.
# Expected: a run that fails the gate is not saved, or not taken as the base.
# Seen:
#   1 second, nothing stored yet:    exit code 0
#   2 seconds, the gate allows 5 %:  exit code 1
#   2 seconds, the same command:     exit code 0
. "$(dirname "$0")/common.sh"
install pytest==9.2.0 pytest-benchmark==5.3.1
cat > test_step.py <<'PY'
import itertools, os

# A clock that says how long each call takes: no time of this machine matters.
clock = map(float, itertools.count(0, int(os.environ["SECONDS_PER_CALL"])))


def test_step(benchmark):
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=5)
PY
run() { # run SECONDS_PER_CALL OPTION...: prints the exit code
  code=0
  SECONDS_PER_CALL=$1 timeout 60 "$python" -m pytest -q "${@:2}" test_step.py >>output.log 2>&1 || code=$?
  echo "$code"
}
gate=(--benchmark-autosave --benchmark-compare --benchmark-compare-fail=median:5%)
first=$(run 1 --benchmark-autosave)
second=$(run 2 "${gate[@]}")
third=$(run 2 "${gate[@]}")
echo "1 second, nothing stored yet:    exit code $first"
echo "2 seconds, the gate allows 5 %:  exit code $second"
echo "2 seconds, the same command:     exit code $third"
[ "$first $second $third" = "0 1 0" ]
