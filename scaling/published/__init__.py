"""Published training runs, recomputed from their own figures.

Each line of `runs.csv` is a published run: the figures as printed, and the page that prints them.
Brackets after the name of the source say which figures are derived or assumed.

| source | what it is |
|---|---|
| llm-foundry | MosaicML's MPT models, 125m to 70b, FSDP on A100 and H100 |
| torchtitan | Llama 2 and 3 with FSDP2, one reading late in each run |
| fms-fsdp | IBM's Llama 2 with FSDP and HSDP |
| torchao | Llama 3.1 8B in bfloat16 and float8, on NVIDIA and AMD |
| Megatron-Core | NVIDIA's weak scaling of GPT models, bfloat16 on H100 |
| NeMo 24.07 | NVIDIA's pre-training table, float8 |
| Megatron-Bridge | the successor of that table; it counts half of the attention |
| Korthikanti et al. 2022 | table 5 of the paper on activation recomputation, copied by Calculon |
| SimuMax | measurements that a simulator is compared with, eight B200 |
| vTrain | measurements that a simulator is compared with, A100 |
| lightning-thunder | Llama 2 7B on H100 from one pull request |
"""
