"""Writes a package `recipes` whose runs sleep, and then write a record: for tests of many cells.

Every rank appends a line to the file `ranks` when it begins, and the first one when it ends. No run
ends while there is a file `hold`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scaling.sweep.study import Cell
from tests.builders.records import make_config
from tests.builders.sweeps import make_record_of
from unitransformer.config import ParallelConfig, to_dict
from unitransformer.record.checksums import add_checksums

READ = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parents[DEPTH]
ANSWERS = json.loads((HERE / "answers").read_text())
"""
GPT = """
def note(word):
    cell = Path(os.environ["UNITRANSFORMER_RUN_FOLDER"]).name
    rank = os.environ.get("SLURM_PROCID", "0")
    with (HERE / "ranks").open("a") as log:
        log.write(f"{word} {cell} {rank} {socket.gethostname()}\\n")
    return rank

for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(75))
rank = note("begins")
time.sleep(ANSWERS["seconds"])
while (HERE / "hold").exists():
    time.sleep(0.1)
step = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
note("-".join(["done", *step]))
if rank == "0":
    words = ["-".join(["done", *step]), Path(os.environ["UNITRANSFORMER_RUN_FOLDER"]).name]
    while True:  # as training ends with a barrier
        lines = [line.split()[:2] for line in (HERE / "ranks").read_text().splitlines()]
        if lines.count(words) >= int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)):
            break
        time.sleep(0.1)
    record = ANSWERS[json.dumps(sys.argv[1:])]["record"]
    path = Path(os.environ["UNITRANSFORMER_RUN_FOLDER"], "x-1.json")
    path.write_text(json.dumps(record))
    note("ends")
"""
PLAN = """
HOST = {"cpu": "Example 9000", "memory_gib": 4.0, "gpus": []}
for line in sys.stdin:
    question = json.loads(line)
    if "machine" in question:
        print(json.dumps({"fingerprint": "0", "host": HOST}), flush=True)
    else:
        config = ANSWERS[json.dumps(question["arguments"])]["config"]
        print(json.dumps({"config": config}), flush=True)
"""
WORKER = """
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
for line in sys.stdin:
    asked, started_s = json.loads(line), time.monotonic()
    with open(asked["log"], "w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "recipes.gpt", *asked["arguments"]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, **asked["variables"]},
        )
    answer = {"ending": "ended", "exit_code": run.wait()}
    print(json.dumps({**answer, "elapsed_s": time.monotonic() - started_s}), flush=True)
"""


def write_fake_recipes(folder: Path, cells: Sequence[Cell], *, seconds: float) -> None:
    """Writes the package for these cells, which differ in their batch sizes and nodes."""
    answers: dict[str, object] = {"seconds": seconds}
    for cell in cells:
        parallel = ParallelConfig(
            accelerator="cpu", strategy="ddp", devices=1, num_nodes=cell.num_nodes
        )
        size = int(cell.options["batch-size"])
        config = replace(make_config(), batch_size=size, parallel=parallel)
        record = add_checksums(make_record_of(config))
        answers[json.dumps(cell.arguments)] = {"config": to_dict(config), "record": record}
    (folder / "recipes/service").mkdir(parents=True)
    (folder / "answers").write_text(json.dumps(answers))
    (folder / "ranks").touch()
    for name, text in (("gpt", GPT), ("service/plan", PLAN), ("service/worker", WORKER)):
        head = READ.replace("DEPTH", str(1 + name.count("/")))
        (folder / f"recipes/{name}.py").write_text(head + text)
    for name in ("__init__", "service/__init__", "service/failure_record"):
        (folder / f"recipes/{name}.py").write_text("")
