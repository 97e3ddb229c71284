#!/usr/bin/env bash
# jsonargparse 4.53.0: the same text means another value inside a list: `--x 010` of type int is 10, and
# `--x [010]` of type list[int] is [8]. `--x on` of type Literal["on", "off"] is accepted, `--x [on]` of a list of
# these is refused as True. An int also takes 1:30, as 90. Lists are read as YAML 1.1, single values first as they are.
# Expected: one value for one text, and an error for 1:30.
# Seen:
#   int 010 -> 10, int 1:30 -> 90, list[int] [010] -> [8]
#   Literal['on', 'off'] on -> on, a list of these [on] -> Got value: True
. "$(dirname "$0")/common.sh"
install jsonargparse==4.53.0 PyYAML==6.0.3
cat > check.py <<'PY'
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

Switch = Literal["on", "off"]


def parse(of_type, text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=of_type)
    try:
        return parser.parse_args(["--x", text]).x
    except ArgumentError as error:
        return str(error).splitlines()[-1].partition(". ")[2]


numbers = parse(int, "010"), parse(int, "1:30"), parse(list[int], "[010]")
switches = parse(Switch, "on"), parse(list[Switch], "[on]")
print("int 010 -> {}, int 1:30 -> {}, list[int] [010] -> {}".format(*numbers))
print("Literal['on', 'off'] on -> {}, a list of these [on] -> {}".format(*switches))
assert numbers == (10, 90, [8]), "changed"
assert switches[0] == "on" and "True" in switches[1], "changed"
PY
"$python" check.py
