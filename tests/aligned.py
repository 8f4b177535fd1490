"""Safetensors files whose tensors lie in memory as new ones do."""

from pathlib import Path


def align(file: Path) -> None:
    """Moves the tensors of a safetensors file to where they lie as new ones do in memory: on some CPUs the bits of a
    product of one row depend on where the weight begins."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * (-end % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
