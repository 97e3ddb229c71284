"""Boots a real SLURM on this machine: one controller, munge, and three nodes with fake GPUs.

Every node has a separate host name and process namespace. All files are in one folder, and all
processes end with this one.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.processes import PATIENCE_S

NODES = ("node1", "node2", "node3")
GPUS = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "setpriv")
INSTALL = (
    "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge "
    "environment-modules"
)

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=120
CredType=cred/munge
FirstJobId={first_job}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
PlugStackConfig={root}/etc/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait={patience}
MessageTimeout=30
TCPTimeout=20
BatchStartTimeout=100
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=1:00:00 State=UP
PartitionName=test Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low PriorityTier=1 GraceTime={patience} PreemptMode=REQUEUE
PartitionName=brief PriorityTier=1 GraceTime=1 PreemptMode=REQUEUE
PartitionName=high PriorityTier=9 PreemptMode=OFF
PartitionName=endless PriorityTier=5 PreemptMode=OFF MaxTime=INFINITE
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:h200:8 "
    "Features=rack{weight},h200 Weight={weight} State=UNKNOWN"  # jobs get nodes in this order
)


def missing() -> str | None:
    """Why SLURM cannot run here, with the command that installs it; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: {INSTALL}"
    if os.geteuid() != 0:
        return "a SLURM with several nodes on one machine needs root, for its namespaces"
    probe = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"])
    return "namespaces are not allowed here" if probe.returncode else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A cluster that boots in a tenth of a second. SLURM's commands find it through `variables`."""

    def __init__(self, root: Path, first_job: int, nodes: Sequence[str] = NODES) -> None:
        self.root, self.first_job, self.nodes = root, first_job, nodes
        self.variables = {"SLURM_CONF": str(root / "etc/slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._frozen: set[str] = set()
        self._ports = _free_ports(1 + len(nodes))

    def start(self) -> None:
        for name in (
            "etc",
            "run",
            "log",
            "state",
            "spool",
            "dev",
            *(f"spool/{n}" for n in self.nodes),
        ):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        self._configure()
        self._begin("munged", *self._munged())
        until(lambda: (self.root / "run/munge.socket").is_socket(), "munge answers")
        self._begin("slurmctld", "slurmctld", "-D", "-f", self.variables["SLURM_CONF"])
        for name in self.nodes:
            self.start_node(name)
        until(lambda: _listens(self._ports[0]), "slurmctld answers")
        until(lambda: self.idle() == len(self.nodes), "the nodes are idle")

    def stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()

    def start_node(self, name: str) -> None:
        """Starts a node in a separate namespace of host name, mounts and processes."""
        hosts = self.root / "etc/hosts"
        script = (
            f"hostname {name}; mount --bind {hosts} /etc/hosts; "
            f"exec slurmd -D -N {name} -f {self.variables['SLURM_CONF']}"
        )
        inside = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._begin(name, "unshare", *inside, "sh", "-c", script)

    def kill_node(self, name: str) -> None:
        """Kills slurmd and every process of the node, as a power failure does."""
        self._frozen.discard(name)
        self._daemons[name].kill()
        self._daemons[name].wait()

    def freeze_node(self, name: str) -> None:
        """Stops all processes of the node: seen from outside, as a power failure without resets."""
        self._frozen.add(name)
        inside = psutil.Process(self._daemons[name].pid)
        frozen: set[int] = set()
        while new := [
            child for child in inside.children(recursive=True) if child.pid not in frozen
        ]:
            for process in new:  # a process may have been started meanwhile
                process.suspend()
                frozen.add(process.pid)

    def hide(self, name: str, folder: Path) -> None:
        """Hides a folder from a node for as long as the node lives, by an empty one on its disk."""
        inside = ("nsenter", f"--target={self._daemons[name].pid}", "--mount")
        self.run(*inside, "mount", "-t", "tmpfs", "none", str(folder))

    def declare_dead(self, name: str) -> None:
        """Marks the node as down, as SLURM does after a SlurmdTimeout of five minutes."""
        self.kill_node(name)
        time.sleep(1)  # its requeued job may start at once: see `hurry`
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")

    def restore(self) -> None:
        """Empties the queue and makes every node idle."""
        for name in [*self._frozen]:
            self.kill_node(name)
        self.run("scancel", "--user", getpass.getuser())
        for name in self.nodes:
            if self._daemons[name].poll() is not None:
                # Its interrupted work is over.
                self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")
                self.start_node(name)
        until(lambda: not self.run("squeue", "--noheader"), "the queue is empty")
        with contextlib.suppress(subprocess.CalledProcessError):  # already idle
            self.run("scontrol", "update", "NodeName=ALL", "State=RESUME")
        until(lambda: self.idle() == len(self.nodes), "the nodes are idle")

    def hurry(self, job: str, *, restart: int = 1) -> None:
        """Starts a requeued job early: SLURM would wait until the credential of its last start
        expires, which takes two minutes and tests nothing.

        Args:
            restart: number of the start that is waited for.
        """

        def is_back() -> bool:
            now = self.state(job)  # on a busy machine it may have run to its end meanwhile
            return now["JobState"] == "PENDING" or int(now["Restarts"]) >= restart

        until(is_back, f"job {job} is queued again")
        while (before := self.state(job))["JobState"] == "PENDING":
            time.sleep(1)  # a credential signed in the same second would be taken for the old one
            if self.state(job)["Restarts"] == before["Restarts"]:
                with contextlib.suppress(subprocess.CalledProcessError):  # it runs already
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                return

    @contextlib.contextmanager
    def configured(self, **values: str) -> Iterator[None]:
        """Changes settings until the block ends."""
        text = before = (self.root / "etc/slurm.conf").read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        try:
            self._reconfigure(text)
            yield
        finally:
            self._reconfigure(before)

    def idle(self) -> int:
        """The number of idle nodes."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return (
                self.run("sinfo", "--noheader", "--Node", "--partition=test", "--format=%t")
                .split()
                .count("idle")
            )
        return 0

    def run(self, *command: str) -> str:
        """The output of one of SLURM's commands."""
        return subprocess.run(
            command,
            env={**os.environ, **self.variables},
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        ).stdout

    def state(self, job: str) -> dict[str, str]:
        """What SLURM knows about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Waits until a job is in one of `states`."""
        until(
            lambda: self.state(job)["JobState"] in states,
            f"job {job} is {' or '.join(states)}",
        )
        return self.state(job)

    def _begin(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env={**_clean(), **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _reconfigure(self, text: str) -> None:
        (self.root / "etc/slurm.conf").write_text(text)
        self.run("scontrol", "reconfigure")

    def _munged(self) -> Sequence[str]:
        run, etc = self.root / "run", self.root / "etc"
        return (
            *("munged", "--foreground", "--force", f"--key-file={etc}/munge.key"),
            *(f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid"),
            *(f"--seed-file={run}/munged.seed", f"--log-file={self.root}/log/munged.log"),
        )

    def _configure(self) -> None:
        etc, host = self.root / "etc", socket.gethostname()
        nodes = [
            NODE.format(name=name, host=host, port=port, weight=weight)
            for weight, (name, port) in enumerate(zip(self.nodes, self._ports[1:], strict=True), 1)
        ]
        config = CONFIG.format(
            host=host,
            user=getpass.getuser(),
            root=self.root,
            ports=self._ports,
            first_job=self.first_job,
            nodes="\n".join(nodes),
            patience=int(PATIENCE_S),
        )
        (etc / "slurm.conf").write_text(config)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "plugstack.conf").write_text("")
        for number in range(GPUS):
            (self.root / f"dev/gpu{number}").symlink_to("/dev/null")
        gres = f"NodeName={','.join(self.nodes)} Name=gpu Type=h200 File={self.root}/dev/gpu[0-7]\n"
        (etc / "gres.conf").write_text(gres)
        (etc / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.nodes)}\n")
        key = etc / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)


def _clean() -> dict[str, str]:
    """The environment of this process without the variables of SLURM."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for unbound in sockets:
            unbound.bind(("127.0.0.1", 0))
        return [int(bound.getsockname()[1]) for bound in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:.0f} s in vain until {what}")
        time.sleep(0.15)  # most conditions ask the controller


@contextlib.contextmanager
def running_cluster(
    root: Path, *, first_job: int = 1, nodes: Sequence[str] = NODES
) -> Iterator[Cluster]:
    """A cluster until the block ends; concurrent clusters need different job numbers.

    The ports of ranks follow from the job number.
    """
    cluster = Cluster(root, first_job, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


CONTROLLER = """
ClusterName=shapes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmctldLogFile={root}/log
SlurmctldPidFile={root}/pid
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
PrivateData=cloud
EnforcePartLimits=ALL
"""
IMAGINARY = (  # sinfo shows such nodes because of PrivateData
    "NodeAddr=127.0.0.1 CPUs=192 Boards=1 SocketsPerBoard=2 CoresPerSocket=96 ThreadsPerCore=1 "
    "RealMemory=2000000 State=CLOUD"
)
LARGE = f"""
GresTypes=gpu
MaxArraySize=100
NodeName=h[001-064] Gres=gpu:h200:8 {IMAGINARY}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-0 State=UP
"""
# One partition with three types of GPUs, and rules of the site in a script.
MIXED = f"""
GresTypes=gpu,nvme
JobRequeue=0
MaxArraySize=100
JobSubmitPlugins=lua
NodeName=a[1-2] Gres=gpu:a100:4 Features=a100,old {IMAGINARY}
NodeName=h[1-2] Gres=gpu:h100:8,nvme:1 Features=h100 {IMAGINARY}
NodeName=m[1-2] Gres=gpu:1g.10gb:7 {IMAGINARY}
PartitionName=DEFAULT Nodes=ALL MaxTime=UNLIMITED
PartitionName=all Default=YES
PartitionName=mig Nodes=m[1-2]
PartitionName=short Nodes=h[1-2] MaxTime=1:00:00
PartitionName=billed
PartitionName=ruled
PartitionName=shared
PartitionName=few Nodes=h[1-2] State=DOWN
"""
RULES = """
function slurm_job_submit(job, partitions, uid)
  if job.partition == "billed" and job.account == nil then
    return slurm.ESLURM_INVALID_ACCOUNT
  elseif job.partition == "ruled" and job.qos == nil then
    slurm.log_user("----------\\nPlease choose a QOS.\\n----------")
    return slurm.ERROR
  elseif job.partition == "shared" and job.shared == 0 then
    slurm.log_user("Whole nodes are not given out here.")
    return slurm.ERROR
  elseif job.partition == "few" and string.find(job.dependency or "", ":%d+:") then
    -- A third array waits for two others. slurmctld says this where accounts have a MaxSubmitJobs.
    slurm.log_user("AssocMaxSubmitJobLimit")
    return slurm.ESLURM_ACCOUNTING_POLICY
  end
  return slurm.SUCCESS
end
function slurm_job_modify() return slurm.SUCCESS end
return slurm.SUCCESS
"""
# SLURM does not count GPUs, there are no arrays, and a job has to say how long it takes.
UNCOUNTED = f"""
MaxArraySize=0
JobSubmitPlugins=require_timelimit
NodeName=n[1-8] {IMAGINARY}
PartitionName=all Nodes=ALL Default=YES MaxTime=2-0
"""


@contextlib.contextmanager
def controller_alone(root: Path, shape: str = LARGE) -> Iterator[str]:
    """Starts a controller for imaginary nodes; yields its configuration file."""
    (port,) = _free_ports(1)
    (root / "state").mkdir()
    (root / "plugstack.conf").write_text("")
    (root / "job_submit.lua").write_text(RULES)
    counts = re.findall(r"(NodeName=\S+) Gres=(\S+)", shape)
    gres = [
        f"{node} Name={name} {f'Type={kind} ' if kind else ''}Count={number}\n"
        for node, items in counts
        for name, kind, number in re.findall(r"(\w+):(?:([\w.]+):)?(\d+)(?:,|$)", items)
    ]
    (root / "gres.conf").write_text("".join(gres))
    config = root / "slurm.conf"
    values = {"host": socket.gethostname(), "port": port, "user": getpass.getuser(), "root": root}
    config.write_text(CONTROLLER.format(**values) + shape)
    with (root / "out").open("wb") as out:
        controller = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "slurmctld", "-D", "-f", config],
            env={**_clean(), "PATH": _path()},
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: _listens(port) or controller.poll() is not None, "slurmctld answers")
        assert controller.poll() is None, (root / "out").read_text()
        yield str(config)
    finally:
        controller.kill()
        controller.wait()


if __name__ == "__main__":  # keeps a cluster up to try things on: python -m tests.slurm.cluster DIR
    with running_cluster(Path(sys.argv[1]).absolute()) as tried:
        print(f"export SLURM_CONF={tried.variables['SLURM_CONF']}", flush=True)
        signal.pause()
