#!/usr/bin/env bash
# pip 24.0 (and 23.2.1, that of Python 3.11.7): `--quiet --report -` prints the report as JSON, but with `--log FILE`
# the progress bar of a download stands before it on standard output. pip 25.0.1 no longer does that.
# Expected: with `--quiet` standard output is the report alone, whether a log is written or not.
# Seen:
#   pip 24.0 without --log: standard output is JSON
#   pip 24.0 with --log: standard output begins with a progress bar
#   pip 25.0.1 with --log: standard output is JSON
. "$(dirname "$0")/common.sh"
install pip==24.0
mkdir files
"$python" - <<'PY'
import os
import zipfile

with zipfile.ZipFile("files/sample-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("sample/data", os.urandom(200_000))
    wheel.writestr("sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    wheel.writestr("sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    wheel.writestr("sample-1.0.dist-info/RECORD", "")
PY
port=$(free_port)
"$python" -m http.server --bind 127.0.0.1 --directory files "$port" >server.out 2>&1 &
daemons[server]=$!
wait_until "python3 -c 'import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:$port/\")' 2>/dev/null"

# look OPTION...: says what stands on standard output.
look() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-cache-dir --dry-run --report - \
    --find-links "http://127.0.0.1:$port/" "$@" sample==1.0 2>errors.txt >report.txt || { tail -n 3 errors.txt; exit 1; }
  "$python" - <<'PY'
import json

text = open("report.txt", encoding="utf-8").read()
try:
    assert json.loads(text)["install"][0]["metadata"]["name"] == "sample"
    print("is JSON")
except ValueError:
    assert json.loads(text[text.index("{"):])["install"]
    print("begins with a progress bar" if "\u2501" in text.splitlines()[0] else "is something else")
PY
}
without=$(look) with=$(look --log log.txt)
echo "pip 24.0 without --log: standard output $without"
echo "pip 24.0 with --log: standard output $with"
"$python" -m pip install --quiet --quiet --disable-pip-version-check pip==25.0.1
later=$(look --log log.txt)
echo "pip 25.0.1 with --log: standard output $later"
[ "$without" = "is JSON" ] && [ "$with" = "begins with a progress bar" ] && [ "$later" = "is JSON" ]
