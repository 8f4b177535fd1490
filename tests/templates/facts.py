"""What a template needs, one line each: read from the templates by `walk`, judged by `verdicts`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("facts.tsv")
_LISTS = "tuple[str, ...]"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one template with a local diffusion model that reaches a sampler."""

    usage: int
    """How often it has been opened, as the templates' index counts."""
    template: str
    needs: str
    """The ComfyUI that it asks for."""
    families: tuple[str, ...]
    networks: tuple[str, ...]
    """ComfyUI's classes; `?` where the name of one is not known."""
    quantised: tuple[str, ...]
    loaders: tuple[str, ...]
    """After the conversion."""
    left: tuple[str, ...]
    """Loaders that the conversion has left, with its reason."""
    nodes: tuple[str, ...]
    """Types of those that MODEL passes."""
    samplers: tuple[str, ...]
    """Types of those that take MODEL and give none, and of the samplers behind guiders."""
    beside: tuple[str, ...]
    """Types of others that can reach into the network."""
    missing: tuple[str, ...]
    """Classes and node types that the ComfyUI does not have which the templates were read with."""


@dataclass(frozen=True)
class Walked:
    """All of them, and of which versions."""

    templates: str
    comfyui: str
    facts: tuple[Facts, ...]


def write(walked: Walked, path: Path = FILE) -> None:
    """As tab-separated text behind a line with the versions."""
    names = [column.name for column in fields(Facts)]
    rows = [[_text(getattr(facts, name)) for name in names] for facts in walked.facts]
    head = f"# comfyui-workflow-templates-json {walked.templates}, ComfyUI {walked.comfyui}"
    path.write_text("\n".join([head, *("\t".join(row) for row in [names, *rows])]) + "\n")


def read(path: Path = FILE) -> Walked:
    """What `write` wrote."""
    head, names, *rows = path.read_text().splitlines()
    templates, comfyui = (part.rsplit(" ", 1)[1] for part in head.split(", "))
    kinds = {column.name: column.type for column in fields(Facts)}
    facts = []
    for row in rows:
        texts = dict(zip(names.split("\t"), row.split("\t"), strict=True))
        facts.append(Facts(**{name: _value(str(kinds[name]), text) for name, text in texts.items()}))
    return Walked(templates, comfyui, tuple(facts))


def _text(value: int | str | Iterable[str]) -> str:
    return str(value) if isinstance(value, int | str) else "; ".join(value)


def _value(kind: str, text: str) -> int | str | tuple[str, ...]:
    if kind == _LISTS:
        return tuple(text.split("; ")) if text else ()
    return int(text) if kind == "int" else text
