"""An example machine."""

from unitransformer.machine.host import Machine

MACHINE = Machine(
    cpu="A processor",
    cpu_cores=2,
    cpu_quota=None,
    memory_gib=16.0,
    system="Linux",
    architecture="x86_64",
    software={"torch": "2.13.0"},
)
