"""NVIDIA's machine code as nvdisasm prints it with source lines: instructions, labels, and what accesses tiles."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tritonbn.kernels import tiles

_SOURCE = re.compile(r'//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """An instruction of a warp."""

    name: str  # with its parts: LDG.E.128
    target: str | None = None  # the label that it branches to
    tile: str | None = None  # load or store, if the source line that it comes from is one of the two tile functions


def parse(text: str) -> Iterator[Instruction | str]:
    """The instructions in their order, and the labels between them."""
    tile = None
    for line in text.splitlines():
        if found := _SOURCE.search(line):
            tile = tile_function(found[1], int(found[2]))
        elif found := _LABEL.match(line.strip()):
            yield found[1]
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[2])
            yield Instruction(found[1], target[1] if target else None, tile)


def access_bits(name: str) -> int:
    """Bits that a thread loads or stores: LDG.E.128 -> 128, STG.E.U16 -> 16, LDG.E -> 32."""
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", name)
    return int(found[1]) if found else 32


def tile_function(file: str, line: int) -> str | None:
    """load, store, or neither: which of the two tile functions a source line belongs to."""
    if Path(file).name != "tiles.py":
        return None
    for name, function in (("load", tiles.load_tile), ("store", tiles.store_tile)):
        source, first = inspect.getsourcelines(function.fn)
        if first <= line < first + len(source):
            return name
    return None
