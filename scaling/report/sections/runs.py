"""The page of single runs: what each recipe's longest run built, its speed, memory and FLOPs."""

from collections.abc import Sequence

from scaling.markdown import code_block, command_block, details, escaped, folded_commands
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.sections.parity import parity_cell
from scaling.report.sections.speed import figures_table, mfu_tables
from scaling.report.store_analysis import StoreAnalysis
from scaling.report.table_notes import conditions_of_rows, draw
from scaling.store.run import Run
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.record.units import format_count


def runs_page(analysis: StoreAnalysis) -> list[str]:
    """Returns the blocks on each recipe's runs; the longest one is compared with the others."""
    blocks, single = list[str](), {run.name for run in analysis.store.single_runs}
    for recipe, (run, *others) in analysis.longest_runs.items():
        blocks += [
            f"## {run_formatting.TITLES[recipe]}",
            f"{escaped(run_formatting.label(run))}, {format_count(run.num_steps, 'step')}, "
            f"{run_formatting.record(run)}:",
            command_block(run_formatting.command(run)),
            "### Architecture",
            code_block(draw_architecture(run.config), "mermaid"),
            "### Parameters",
            details("Parameters", code_block(run.record["summary"])),
            "### Speed and memory",
            figures_table(run, others),
            "### FLOPs and MFU",
            *mfu_tables(run),
        ]
        singles = [run for run in (run, *others) if run.name in single]
        blocks += _all_runs(singles, analysis.store.certificates)
    return blocks


def _all_runs(runs: Sequence[Run], certificates: Sequence[Certificate]) -> list[str]:
    if len(runs) < 2:
        return []
    rows, commands = [], []
    for number, run in enumerate(runs, 1):
        overview = run_formatting.overview(run, parity_cell(run, certificates))
        rows.append({"#": str(number)} | overview)
        commands.append((str(number), run_formatting.command(run)))
    return [
        "### All runs",
        *conditions_of_rows([run.record for run in runs]),
        *draw(rows, always=("#", "speed", "record")),
        folded_commands("Commands of all runs", commands),
    ]


def draw_architecture(config: RunConfig) -> str:
    """Draws a Mermaid flowchart of what is built, and of the positions that the loss uses.

    No label begins with + or -, as Mermaid would take it for a list and refuse.
    """
    model = config.model
    length = format_count(config.sequence_length, "position")
    layers = format_count(model.num_layers, "layer")
    in_turn = ", one after the other" if model.num_layers > 1 else ""
    norm = f'final_norm["LayerNorm {model.width:,}"] --> ' if model.final_norm else ""
    used, loss = _loss(config)
    bias = "with bias" if model.head_bias else "no bias"
    tied = ", tied to the embedding" if model.tied_head else ""
    head = f"head: linear {model.width:,} → {model.num_classes:,}<br/>{bias}{tied}"
    return "\n".join(
        [
            "flowchart TB",
            *_input_nodes(config),
            f'    positions["sinusoidal encoding of {length} added{_dropout(model)}"]',
            "    embedding --> positions",
            f'    subgraph layers["{layers}{in_turn}"]',
            *(f"        {line}" for line in _layer_nodes(model)),
            "    end",
            "    positions --> norm1 & add1",
            f'    add2 -- "{used}" --> {norm}head',
            f'    head["{head}"] --> loss(["{loss}"])',
        ]
    )


def _input_nodes(config: RunConfig) -> list[str]:
    model, length = config.model, config.sequence_length
    if model.image_size is None or model.patch_size is None:
        masked = f", {config.data.mask_fraction:.0%} masked" if config.recipe == "bert" else ""
        return [
            f'    input(["{format_count(length, "token")}{masked}"]) --> embedding',
            f'    embedding["embedding: {model.num_classes:,} tokens x {model.width:,}<br/>'
            f'times √{model.width:,}"]',
        ]
    size, patch = model.image_size, model.patch_size
    pixels, patches = model.num_channels * patch**2, format_count(length - 1, "patch", "patches")
    return [
        f'    input(["image, {model.num_channels} x {size} x {size}"]) --> patches',
        f'    patches["{patches} of {patch} x {patch} pixels<br/>'
        f'linear {pixels:,} → {model.width:,}"] --> embedding',
        f'    embedding["class token in front: {length:,} positions x {model.width:,}"]',
    ]


def _layer_nodes(model: ModelConfig) -> list[str]:
    sees = "causal: sees itself and what came before" if model.causal else "sees all positions"
    heads = f"{format_count(model.num_heads, 'head')} x {model.head_width:,}"
    hidden = f"{model.width:,} → {model.feedforward_width:,} → {model.width:,}"
    return [
        f'norm1["LayerNorm {model.width:,}"] --> attention',
        f'attention["attention: {heads}<br/>{sees}"] --> add1(("⊕"))',
        "add1 --> norm2 & add2",
        f'norm2["LayerNorm {model.width:,}"] --> feedforward',
        f'feedforward["feed-forward: {hidden}<br/>{model.activation}{_dropout(model)}"]'
        ' --> add2(("⊕"))',
    ]


def _dropout(model: ModelConfig) -> str:
    return f", dropout {model.dropout:g}" if model.dropout else ""


def _loss(config: RunConfig) -> tuple[str, str]:
    """Returns the positions that the loss uses, and what it is."""
    predicted = count_predicted_positions(config)
    match config.recipe:
        case "bert":
            masked = format_count(predicted, "masked token")
            used = f"{predicted} masked of {config.sequence_length} positions"
            return used, f"cross entropy of {masked}"
        case "gpt":
            used = f"all {format_count(predicted, 'position')}"
            return used, f"cross entropy of the next token, {predicted} per sample"
        case "vit":
            labels = f"{config.model.num_classes:,}"
            return "the class token", f"cross entropy of the label, one of {labels}"
