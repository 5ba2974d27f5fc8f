"""Some of a tensor's values, as torch.distributed.checkpoint asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from packlight.ranks.tensor import Part


@dataclass(frozen=True)
class Block:
    """Values that lie beside one another in a whole tensor, and in this rank's.

    Attributes:
        offsets: of each dimension in the whole.
        sizes: of each dimension.
        own_offsets: of each dimension in this rank's.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    own_offsets: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The block as a checkpoint names it."""
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Return the block's values in this rank's tensor."""
        for dim, (first, size) in enumerate(zip(self.own_offsets, self.sizes, strict=True)):
            value = value.narrow(dim, first, size)
        return value


class PieceOfTensor(torch.Tensor):
    """Some blocks of a tensor.

    Attributes:
        whole_shape: of the tensor.
        blocks: none where there is nothing.
    """

    whole_shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @staticmethod
    def of(value: torch.Tensor, whole_shape: tuple[int, ...], first: int) -> PieceOfTensor:
        """Return some rows of a tensor, from the first on; they look at a tensor's memory."""
        zeros = (0,) * (value.ndim - 1)
        block = Block((first, *zeros), tuple(value.shape), (0, *zeros))
        return PieceOfTensor._made(value, whole_shape, [block])

    @staticmethod
    def of_part(value: torch.Tensor, part: Part, first: int) -> PieceOfTensor:
        """Return some rows of a rank's part of a tensor."""
        return PieceOfTensor._made(value, part.shape, _blocks(tuple(value.shape), part, first))

    @staticmethod
    def _made(
        value: torch.Tensor, whole_shape: tuple[int, ...], blocks: Iterable[Block]
    ) -> PieceOfTensor:
        piece = value.detach().as_subclass(PieceOfTensor)
        piece.whole_shape, piece.blocks = whole_shape, tuple(blocks) if value.numel() else ()
        return piece

    @property
    def plain(self) -> torch.Tensor:
        """The values as an ordinary tensor."""
        return self.as_subclass(torch.Tensor)

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the whole tensor, with which the checkpoint's is compared."""
        return torch.Size(self.whole_shape) if dim is None else self.whole_shape[dim]

    def __create_write_items__(self, name: str, value: object) -> list[WriteItem]:
        items = []
        for block in self.blocks:
            data = TensorWriteData(
                chunk=block.chunk, properties=TensorProperties.create_from_tensor(self.plain),
                size=torch.Size(self.whole_shape),
            )
            place = MetadataIndex(name, block.chunk.offsets)
            items.append(WriteItem(place, WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [block.chunk for block in self.blocks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        (block,) = (b for b in self.blocks if torch.Size(b.offsets) == index.offset)
        return block.of(self.plain)


def _blocks(shape: tuple[int, ...], part: Part, first: int) -> Iterator[Block]:
    """Yield where rows of a part lie in the whole, from a row of the part on."""
    own_first = 0  # in the part, along the dimension in which it is cut
    for whole_first, size in part.blocks:
        offsets, sizes, own = [first, *(0 for _ in shape[1:])], [*shape], [0 for _ in shape]
        if part.dim == 0:
            begin, end = max(own_first, first), min(own_first + size, first + shape[0])
            offsets[0], sizes[0] = whole_first + begin - own_first, end - begin
            own[0] = begin - first
        else:
            offsets[part.dim], sizes[part.dim], own[part.dim] = whole_first, size, own_first
        own_first += size
        if sizes[0] > 0:
            yield Block(tuple(offsets), tuple(sizes), tuple(own))
