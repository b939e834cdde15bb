"""How a load would read its files now, asked of the readers that it would open."""

from __future__ import annotations

from collections import Counter

from .blocks import make_blocks
from .load_plan import LoadPlan
from .pipeline import find_reader
from .readers.automatic import AutomaticReader


def preview_reads(plan: LoadPlan, *, is_in_place: bool, chunk_bytes: int) -> dict[str, int]:
    """Bytes of the plan's files by the name of the reader that a load would read them with; reads none of them.

    Args:
        plan: What would be loaded.
        is_in_place: To an arena in host memory, without a host tier.
        chunk_bytes: Of the load's blocks.

    Raises:
        FileChanged, CheckpointError: As `OpenFiles`.
    """
    num_bytes: Counter[str] = Counter()
    with find_reader(is_in_place=is_in_place)(plan.files) as reader:
        for block in make_blocks(plan, chunk_bytes).blocks:
            of_block = reader
            if isinstance(reader, AutomaticReader):
                of_block = reader.choose(block.path, block.file_offset, block.num_bytes)
            num_bytes[of_block.name] += block.used_bytes
    return dict(num_bytes)
