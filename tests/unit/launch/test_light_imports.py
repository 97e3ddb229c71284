"""Lightning is imported without what a run does not use, which is still there when it is used."""

import subprocess
import sys
from textwrap import dedent

SCRIPT = dedent("""
    import sys
    import unitransformer
    from unitransformer.launch.light_imports import import_lightly

    import_lightly()
    import torch
    from lightning.fabric.wrappers import _unwrap_compiled
    from lightning.pytorch import Trainer
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.tensor import DTensor

    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert _unwrap_compiled(layer) == (layer, None)
    assert not isinstance(layer.weight, DTensor)
    for name in ("sympy", "matplotlib", "torchvision", "torch._dynamo.utils"):
        assert name not in sys.modules, name

    import torch._dynamo.utils

    assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
    assert torch._dynamo.config.recompile_limit > 0
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
    compiled = torch.compile(layer, backend="eager")
    assert _unwrap_compiled(compiled)[0] is layer

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    fully_shard(layer, mesh=DeviceMesh("cpu", [0, 1]))
    assert isinstance(layer.weight, DTensor)
    assert type(layer.weight) is sys.modules["torch.distributed.tensor"].DTensor
    assert DTensor.from_local.__name__ == "from_local"
""")


def test_what_is_put_off_is_absent_until_it_is_used_and_then_itself() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
