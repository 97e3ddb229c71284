#!/usr/bin/env bash
# pytest-benchmark 5.3.1: --benchmark-compare-fail passes, without a line about it, if the benchmark
# that became slower was renamed, was not selected, or was not measured (--benchmark-disable).
# Expected: a failure, or a line that says what of the base was not compared.
# Seen:
#   twice as slow:                        exit code 1
#   twice as slow and renamed:            exit code 0
#   twice as slow and not selected:       exit code 0
#   twice as slow, --benchmark-disable:   exit code 0
#   lines that name test_step: 0
. "$(dirname "$0")/common.sh"
install pytest==9.2.0 pytest-benchmark==5.3.1
cat > test_step.py <<'PY'
import itertools, os

# A clock that says how long each call takes: no time of this machine matters.
clock = map(float, itertools.count(0, int(os.environ["SECONDS_PER_CALL"])))


def measure(benchmark):
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=5)


def test_step(benchmark):
    measure(benchmark)


def test_other(benchmark):
    benchmark.pedantic(lambda: None, rounds=5, setup=None)
PY
run() { # run SECONDS_PER_CALL OPTION...: prints the exit code
  code=0
  SECONDS_PER_CALL=$1 timeout 60 "$python" -m pytest -q "${@:2}" >output.log 2>&1 || code=$?
  echo "$code"
}
gate=(--benchmark-compare --benchmark-compare-fail=min:5%)
run 1 -k step test_step.py --benchmark-autosave >/dev/null
slower=$(run 2 -k step test_step.py "${gate[@]}")
disabled=$(run 2 -k step test_step.py "${gate[@]}" --benchmark-disable)
other=$(run 2 -k other test_step.py "${gate[@]}")
cp output.log all.log
sed -i 's/def test_step/def test_one_step/' test_step.py
renamed=$(run 2 -k step test_step.py "${gate[@]}")
cat output.log >> all.log
echo "twice as slow:                        exit code $slower"
echo "twice as slow and renamed:            exit code $renamed"
echo "twice as slow and not selected:       exit code $other"
echo "twice as slow, --benchmark-disable:   exit code $disabled"
lines=$(grep -c '\btest_step\b[^.]' all.log || true)
echo "lines that name test_step: $lines"
[ "$slower $renamed $other $disabled" = "1 0 0 0" ] && [ "$lines" = 0 ]
