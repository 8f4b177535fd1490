"""The figures of `facts.tsv`: README's block, and the whole list.

python -m tests.templates.table            # the block, for README
python -m tests.templates.table --all      # each template
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable

from tests.templates.facts import Facts, Walked, read
from tests.templates.proven import PROVEN
from tests.templates.verdicts import SPLIT, Verdict, judge

SMALLEST = 300
"""A group of families that has been opened less often has no row of its own in README."""


class Judged:
    """The walked templates with their verdicts."""

    def __init__(self, walked: Walked):
        self.rows = [(facts, judge(facts, walked.comfyui)) for facts in walked.facts]

    def usage(self, wanted: Callable[[Facts, Verdict], bool] = lambda facts, verdict: True) -> int:
        """How often all those have been opened that are wanted."""
        return sum(facts.usage for facts, verdict in self.rows if wanted(facts, verdict))

    def share(self, wanted: Callable[[Facts, Verdict], bool], of: Callable[[Facts, Verdict], bool]) -> str:
        """As a percentage, weighted by usage."""
        return f"{100 * self.usage(lambda *row: wanted(*row) and of(*row)) / self.usage(of):.1f} %"


def works(facts: Facts, verdict: Verdict) -> bool:
    return verdict.works


def split(facts: Facts, verdict: Verdict) -> bool:
    return verdict.works and verdict.how == SPLIT


def opens(facts: Facts, verdict: Verdict) -> bool:
    return not verdict.newer


def proven(facts: Facts, verdict: Verdict) -> bool:
    return facts.template in PROVEN


def everything(facts: Facts, verdict: Verdict) -> bool:
    return True


def as_markdown(walked: Walked) -> str:
    """README's block."""
    judged = Judged(walked)
    here = sum(1 for row in judged.rows if opens(*row))
    lines = [
        f"Of ComfyUI's own templates ({walked.templates}), {len(judged.rows)} sample a model on this machine; ComfyUI"
        f" {walked.comfyui} can open {here} of them. Shares are weighted by how often each has been opened, as the"
        " templates' index counts. Which nodes and classes a template needs was read from it after *Use all GPUs in"
        " this workflow*, how its file is quantised from the file's name; what of that works, from this pack's own"
        " tables.",
        "",
        f"| | of those that ComfyUI {walked.comfyui} opens | of all |",
        "| --- | --- | --- |",
    ]
    shares = {
        "work, or should with a ComfyUI that has their nodes": works,
        "– with every step on all devices (the rest: the prompts and samples of a batch side by side)": split,
        f"– compared with ComfyUI's own loaders in a server, with tiny files ({len(PROVEN)} templates)": proven,
    }
    for title, wanted in shares.items():
        lines.append(f"| {title} | {judged.share(wanted, opens)} | {judged.share(wanted, everything)} |")
    lines += ["", "| model | templates | share of all | verdict |", "| --- | --- | --- | --- |"]
    for families, rows in _groups(judged):
        usage = sum(facts.usage for facts, _ in rows)
        if usage >= SMALLEST:
            lines.append(f"| {families} | {len(rows)} | {100 * usage / judged.usage():.1f} % | {_told(rows)} |")
    return "\n".join(lines) + "\n"


def _groups(judged: Judged) -> list[tuple[str, list[tuple[Facts, Verdict]]]]:
    groups = defaultdict(list)
    for facts, verdict in judged.rows:
        groups[" + ".join(facts.families)].append((facts, verdict))
    return sorted(groups.items(), key=lambda group: -sum(facts.usage for facts, _ in group[1]))


def _told(rows: list[tuple[Facts, Verdict]]) -> str:
    """Verdicts of a group, the most used first; with their shares if there are several."""
    usage: dict[str, int] = defaultdict(int)
    for facts, verdict in rows:
        usage[str(verdict)] += facts.usage
    whole = sum(usage.values())
    order = [verdict for verdict in sorted(usage, key=lambda verdict: -usage[verdict]) if usage[verdict] > whole / 100]
    if len(order) == 1:
        return order[0]
    return "; ".join(f"{100 * usage[verdict] / whole:.0f} % {verdict}" for verdict in order)


def as_text(walked: Walked) -> str:
    """Each template, then the block."""
    judged = Judged(walked)
    lines = [
        f"{facts.usage:6d} {facts.template}: {', '.join(facts.families)}, {', '.join(facts.quantised)}: {verdict}"
        + (" (proven)" if facts.template in PROVEN else "")
        for facts, verdict in judged.rows
    ]
    return "\n".join([*lines, "", as_markdown(walked)])


if __name__ == "__main__":
    print((as_text if "--all" in sys.argv else as_markdown)(read()), end="")
