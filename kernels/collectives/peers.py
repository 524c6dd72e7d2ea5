"""Sums over ranks on the cards of one host, by kernels that write in each other's memory over NVLink.

Every rank makes its own `PeerMemory` of the same group once, and then calls the same methods in the same order, one after
another (one stream, or streams ordered by events), from eager code and from CUDA graphs in any mixture. As with NCCL, a
rank that stays away leaves the others waiting.
"""

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from kernels.collectives.peer_kernels import GATHER, REDUCE, SCATTER, WHOLE, stream_kernel, tagged_kernel
from kernels.collectives.transport import worth_slicing
from kernels.gpu.launch import cdiv, launch
from kernels.tree import Shard

COUNTERS = 1024  # blocks of a tagged launch, at most
TAGGED = 1 << 19  # words a rank may send in one tagged call, to all others together
SLOTS = 4
BLOCKS = 256  # blocks of a stream launch, at most
SLOT_WORDS = 16384  # of all ranks in one slot of one block


class PeerError(RuntimeError):
    """Says what peer memory cannot carry, and what can."""


@dataclass(frozen=True)
class Launch:
    """Says how a message is cut up. No bit depends on it."""

    tagged: bool
    piece: int
    warps: int
    blocks: int = COUNTERS
    lag: int = 1
    whole: bool = False  # all_reduce: every rank adds everything, instead of its slice


@dataclass(frozen=True)
class Areas:
    """Places byte offsets in the memory of a rank, which is all zero at first."""

    size: int

    @property
    def capacity(self) -> int:
        """Returns the words that one rank may send to one other in a tagged call."""
        return TAGGED // max(1, self.size - 1) // 16 * 16

    @property
    def stride(self) -> int:
        """Returns the words of one rank in one slot."""
        return SLOT_WORDS // self.size

    def offsets(self) -> tuple[int, int, int, int, int]:
        """Returns where the tagged boxes, the parts, the rounded sums and the flags begin; and the end."""
        boxes = 2 * self.size * self.capacity * 8
        slots = BLOCKS * SLOTS * SLOT_WORDS * 4
        return 0, boxes, boxes + slots, boxes + 2 * slots, boxes + 2 * slots + 4 * BLOCKS * self.size


class PeerMemory:
    """Moves bytes over memory of this rank that the others write in, and theirs that this rank writes in.

    `PeerMemory(group)` is a collective: one rank per card, all on one host, CUDA devices that reach each other. It takes
    fixed memory (`Areas`; 150 MB for two ranks), whatever the size of the messages, which stream through it.
    """

    capturable = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        shard = Shard(dist.get_rank(group), dist.get_world_size(group))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        name = "no CUDA device" if device is None else str(torch.cuda.get_device_properties(device).uuid)
        places: list[tuple[str, str]] = [("", "")] * shard.size
        dist.all_gather_object(places, (socket.gethostname(), name), group=group)
        _check_places(places)
        assert device is not None
        memory = symmetric.empty(Areas(shard.size).offsets()[-1], dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory, group.group_name)
        memory.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes before everybody's memory is zero
        self.shard, self.device = shard, device
        self._held = memory, handle  # keeps this rank's memory, and the mapping of the others'
        addresses = [int(address) for address in handle.buffer_ptrs]
        boxes, parts, rounded, flags, _ = Areas(shard.size).offsets()
        self._boxes, self._parts, self._rounded, self._flags = (
            tuple(address + offset for address in addresses) for offset in (boxes, parts, rounded, flags)
        )
        self._calls = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._steps = torch.zeros(BLOCKS, dtype=torch.int32, device=device)

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sums over ranks, on the tree, float32 `partial` (any shape), rounded once to `dtype`; the same on every rank."""
        if partial.dtype != torch.float32 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise PeerError(
                f"all_reduce of {partial.dtype} to {dtype}: it adds float32, rounded to a type of 2 or 4 bytes"
            )
        x = self._flat(partial)
        out = torch.empty(partial.shape, dtype=dtype, device=self.device)
        self.launch(REDUCE.value, x, out.view(-1), x.numel(), self.all_reduce_launch(x.numel()))
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of every rank, [size, *x.shape], in rank order; any dtype."""
        words = {1: torch.int8, 2: torch.int16}.get(x.element_size(), torch.int32)
        flat = self._flat(x).view(words)
        out = torch.empty((self.shard.size, *x.shape), dtype=x.dtype, device=self.device)
        self.launch(GATHER.value, flat, out.view(-1).view(words), flat.numel(), self.gather_launch(flat.numel()))
        return out

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Writes into output [n] the tree sum over ranks of their r-th part of input [size * n], both float32."""
        x, n = self._flat(input), output.numel()
        if {x.dtype, output.dtype} != {torch.float32} or x.numel() != self.shard.size * n:
            raise PeerError(f"reduce_scatter: {x.dtype} of {x.numel()} into {n} x {self.shard.size} ranks")
        out = output if output.is_contiguous() else torch.empty(n, dtype=output.dtype, device=self.device)
        self.launch(SCATTER.value, x, self._flat(out), n, self.stream_launch(n))
        if out is not output:
            output.copy_(out.view_as(output))

    def all_reduce_launch(self, n: int) -> Launch:
        """Chooses by size alone: words that carry their own tag; then everything to everyone; then slices and rounded
        slices."""
        size = self.shard.size
        if n * (size - 1) <= 1 << 17:
            return Launch(True, 256 if n <= 1 << 14 else 512, 4)
        if not worth_slicing(n, size):
            return Launch(False, 2048 // max(1, size // 8), 8, whole=True)
        return self.stream_launch(-(-n // size))

    def gather_launch(self, n: int) -> Launch:
        """Chooses for n words of each rank."""
        return Launch(True, 256, 4) if n * (self.shard.size - 1) <= 1 << 17 else self.stream_launch(n)

    def stream_launch(self, n: int) -> Launch:
        """Chooses for slices of n elements."""
        piece = min(4096, Areas(self.shard.size).stride)
        return Launch(False, piece, 8, lag=1 if n <= 2 * BLOCKS * piece else 2)

    def launch(self, kind: int, x: torch.Tensor, out: torch.Tensor, n: int, how: Launch) -> None:
        """Runs one kernel over flat contiguous tensors. `n`: elements of the sum, of one part (SCATTER), of one rank
        (GATHER)."""
        rank, size = self.shard.rank, self.shard.size
        if not n:
            return
        with torch.cuda.device(self.device):
            if how.tagged:
                self._check_tagged(n, how)
                grid = (cdiv(n, how.piece),)
                tagged = (x, out, self._boxes, self._calls, n, Areas(size).capacity)
                launch(tagged_kernel, grid, *tagged, rank, size, kind, how.piece, COUNTERS, num_warps=how.warps)
                return
            kind = WHOLE.value if how.whole and kind == REDUCE.value else kind
            slice_ = cdiv(n, 16 * size) * 16 if kind == REDUCE.value else n
            grid = (min(how.blocks, BLOCKS, cdiv(slice_, how.piece)),)
            arguments = (x, out, self._parts, self._rounded, self._flags, self._steps, n, slice_, rank, size)
            stride = Areas(size).stride
            launch(stream_kernel, grid, *arguments, kind, how.piece, stride, SLOTS, how.lag, num_warps=how.warps)

    def _check_tagged(self, n: int, how: Launch) -> None:
        most = min(Areas(self.shard.size).capacity, COUNTERS * how.piece)
        if n > most:
            raise PeerError(f"a tagged call of {n} words and room for {most}: use a stream launch")

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        if x.device != self.device:
            raise PeerError(
                f"a tensor on {x.device}, peer memory on {self.device}: move it there, or use the group alone"
            )
        return x.contiguous().view(-1)


def _check_places(places: list[tuple[str, str]]) -> None:
    """Raises PeerError unless the ranks have a card each, on one host."""
    for rank, (host, card) in enumerate(places):
        if card == "no CUDA device":
            raise PeerError(f"rank {rank} has no CUDA device: use TreeGroup(group) over gloo")
        if host != places[0][0]:
            raise PeerError(
                f"rank 0 is on {places[0][0]} and rank {rank} on {host}: peer memory is of one host; use NCCL"
            )
        first = places.index((host, card))
        if first != rank:
            raise PeerError(
                f"ranks {first} and {rank} share the card {card}: give each its own, or use TreeGroup(group) over gloo"
            )
