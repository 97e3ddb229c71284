"""Shows speed and memory over other implementations, one table for each network and machine."""

from collections.abc import Sequence

from scaling.markdown import escaped, folded_commands, link
from scaling.peers import ranking
from scaling.peers.record import Comparison
from scaling.report.run_formatting import without_folder
from scaling.report.table_notes import draw

SHORT = 12  # characters of a commit
HOW_TO_READ = (
    "Ratios are ours over the peer's: a speed above 1 is faster, a memory below 1 is smaller. "
    "Both train the same shape on the same batches with fused AdamW, without dropout, in blocks "
    "of steps that take turns in random order; the interval is that of the median over pairs of "
    "blocks, and with several launches over these: that of one launch does not cover others. "
    "Memory is the peak beyond that of the imports. The variant of a peer that is best for it "
    "counts."
)


def peers_blocks(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a sentence and a table for each network; nothing without comparisons."""
    workloads = ranking.find_workloads(comparisons)
    if not workloads:
        return []
    blocks = ["## Against other implementations"]
    for workload in workloads:
        blocks += [f"**{escaped(ranking.answer(workload))}**", _conditions(workload)]
        rows = [
            {name: escaped(cell) for name, cell in row.items()} for row in ranking.rows(workload)
        ]
        blocks += draw(rows, always=("peer", "our speed"))
    commands = dict.fromkeys(
        without_folder(str(c.content["command"])) for w in workloads for c in w.comparisons
    )
    named = [(f"comparison {number}", command) for number, command in enumerate(commands, 1)]
    return [*blocks, HOW_TO_READ, folded_commands("Commands of the comparisons", named)]


def _conditions(workload: ranking.Workload) -> str:
    newest = workload.comparisons[-1].content
    versions = newest["versions"]
    commits = dict.fromkeys(str(c.content["code"]["commit"])[:SHORT] for c in workload.comparisons)
    names = [name for name in ("torch", "transformers", "timm") if name in versions]
    parts = [
        workload.title,
        str(newest["machine"]["cpu"] or "processor unknown"),
        *(f"{name} {versions[name]}" for name in names),
        f"commit{'s' * (len(commits) > 1)} {' and '.join(commits)}",
        str(newest["started_at"])[:10],
    ]
    rate = ranking.our_rate(workload)
    parts += [] if rate is None else [f"ours {rate}"]
    records = [link(c.name, str(number)) for number, c in enumerate(workload.comparisons, 1)]
    return f"{escaped('; '.join(parts))}. Records: {', '.join(records)}."
