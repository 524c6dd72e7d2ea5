"""Host memory that a GPU reads and writes at full speed, and what waits there.

`Waiting` moves whole tensors there and back (colocated mode: the rollout has the card meanwhile); `Passage` updates tensors
that live there, in pieces that pass through the card. Both copy bits: nothing here rounds or adds.
"""

import resource
import sys
from collections.abc import Callable, Iterable, Sequence

import torch

from kernels.host.pinned import host_tensor

PIECE = 1 << 25
"""Elements of a tensor that are on the card at once while it passes: 128 MiB in float32."""
_DEPTH = 3  # pieces in flight: one arrives, one is worked on, one leaves


def clear(tensors: Iterable[torch.Tensor], device: str) -> None:
    """Sets to zero, in place; the card writes them into host memory several times faster than one thread does."""
    zeros: dict[torch.dtype, torch.Tensor] = {}
    for tensor in tensors:
        for piece in tensor.view(-1).split(PIECE):
            if piece.device.type == device:
                piece.zero_()
                continue
            if tensor.dtype not in zeros:
                zeros[tensor.dtype] = torch.zeros(PIECE, dtype=tensor.dtype, device=device)
            piece.copy_(zeros[tensor.dtype][: piece.numel()], non_blocking=True)
    if zeros:
        _wait(device)


def process_peak() -> int:
    """Returns the most bytes of this machine's memory that the process had at once, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Waiting:
    """Holds tensors that leave the card together and come back to where they were, for whoever holds them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        self._kept: dict[int, torch.Tensor] = {}  # host memory of the last time, by size in bytes and order

    @property
    def away(self) -> bool:
        """Says whether tensors wait on the host."""
        return bool(self._copies)

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies the storages of `tensors` to the host and frees them. Whatever else shares such a storage leaves too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if not size or storage._cdata in self._copies:
                continue
            kept = self._kept.get(storage._cdata)
            if kept is None or kept.numel() != size:
                kept = host_tensor((size,), torch.uint8, self.device)
                self._kept[storage._cdata] = kept
            kept.copy_(_bytes(storage), non_blocking=True)
            self._copies[storage._cdata] = storage, kept
        _wait(self.device)
        for storage, kept in self._copies.values():
            if storage.nbytes() == kept.numel():
                storage.resize_(0)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def back(self) -> None:
        """Moves everything back, as the reverse of `leave`."""
        for storage, kept in self._copies.values():
            storage.resize_(kept.numel())
            _bytes(storage).copy_(kept, non_blocking=True)
        _wait(self.device)
        self._copies = {}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Passage:
    """Updates tensors elementwise that live on the host, by kernels of the device: piece i + 1 arrives and piece i - 1
    leaves while piece i is worked on. Cutting changes no bit of an elementwise update."""

    def __init__(self, device: str, piece: int = PIECE) -> None:
        self.device, self.piece = device, piece
        self._streams = [torch.cuda.Stream(), torch.cuda.Stream()] if device == "cuda" else []
        self._rings: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}
        self._free: list[torch.cuda.Event | None] = [None] * _DEPTH
        self._next = 0

    def update(self, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor], work: Callable[..., None]) -> None:
        """Calls work(*pieces of `read`, *pieces of `written`) over flat contiguous pieces of tensors of one length, each passed
        through the device if it is not there. Not complete on the host before `finish`."""
        tensors = [t.detach().view(-1) for t in (*read, *written)]
        n, outputs = tensors[0].numel(), range(len(read), len(tensors))
        for start in range(0, n, self.piece):
            parts = [t[start : start + self.piece] for t in tensors]
            staged = [i for i, part in enumerate(parts) if part.device.type != self.device]
            if self._streams:
                self._pass(parts, staged, outputs, work)
            else:
                work(*parts)

    def _pass(self, parts: list[torch.Tensor], staged: list[int], outputs: range, work: Callable[..., None]) -> None:
        arriving, leaving = self._streams
        slot, self._next = self._next, (self._next + 1) % _DEPTH
        here, on_host = list(parts), [parts[i] for i in staged]
        if staged:
            with torch.cuda.stream(arriving):
                if (free := self._free[slot]) is not None:
                    arriving.wait_event(free)
                for i in staged:
                    here[i] = self._ring(slot, i, parts[i])
                    here[i].copy_(parts[i], non_blocking=True)
            torch.cuda.current_stream().wait_stream(arriving)
        work(*here)
        if staged:
            leaving.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(leaving):
                for i, part in zip(staged, on_host, strict=True):
                    if i in outputs:
                        part.copy_(here[i], non_blocking=True)
                self._free[slot] = leaving.record_event()

    def _ring(self, slot: int, i: int, part: torch.Tensor) -> torch.Tensor:
        key = slot, part.dtype, i
        if key not in self._rings:
            self._rings[key] = torch.empty(self.piece, dtype=part.dtype, device=self.device)
        return self._rings[key][: part.numel()]

    def finish(self) -> None:
        """Waits until the host holds everything, and frees the pieces' room."""
        if self._rings:
            _wait(self.device)
            self._rings, self._free = {}, [None] * _DEPTH
