"""Shards with damage in one of them."""

from pathlib import Path


def copy_with_damage(shards: Path, output: Path, tar: str) -> Path:
    """A copy of a folder of shards in which one bit of the first image of a tar is flipped; the copy's folder."""
    output.mkdir()
    for file in shards.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    raw = bytearray((output / tar).read_bytes())
    raw[700] ^= 1
    (output / tar).write_bytes(raw)
    return output
