"""Runs that others published, and what they say when their own arithmetic is done again.

`runs.csv` holds one published run a line: figures as printed, and the page they are printed on.
What is derived or assumed in a line stands in brackets after the name of its source.

| source | what it is |
|---|---|
| llm-foundry | MosaicML's MPT models, 125m to 70b, FSDP on A100 and H100 |
| torchtitan | Llama 2 and 3 with FSDP2, one reading late in each run |
| fms-fsdp | IBM's Llama 2 with FSDP and HSDP |
| torchao | Llama 3.1 8B in bfloat16 and float8, on NVIDIA and AMD |
| Megatron-Core | NVIDIA's weak scaling of GPT models, bfloat16 on H100 |
| NeMo 24.07 | NVIDIA's pre-training table, float8 |
| Megatron-Bridge | what NVIDIA's table became; it counts half of the attention since |
| Korthikanti et al. 2022 | table 5 of the paper on activation recomputation, by way of Calculon |
| SimuMax | the measured side of a simulator's comparison, eight B200 |
| vTrain | the measured side of a simulator's comparison, A100 |
| lightning-thunder | one pull request's Llama 2 7B on H100 |

`load_rows` reads them, `replay` recomputes and compares, `render_replay` makes the table of
`python -m scaling published`.
"""

from scaling.published.csv_rows import PublishedRow, load_rows
from scaling.published.recompute import Check, Replayed, replay
from scaling.published.table import build_published_parser, render_replay

__all__ = [
    "Check",
    "PublishedRow",
    "Replayed",
    "build_published_parser",
    "load_rows",
    "render_replay",
    "replay",
]
