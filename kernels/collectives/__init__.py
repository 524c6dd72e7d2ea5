"""Sums across ranks in tree order. The transport (gloo, NCCL, peer memory) moves bytes and never adds.

group.py         TreeGroup and reduce_scatter: what the rest of the system calls; gloo and NCCL
rendezvous.py    where ranks find each other
peers.py         PeerMemory: the same sums by kernels that write in the other ranks' memory, in a CUDA graph or not
peer_kernels.py  those kernels; fold_kernel.py  the fold of tensors that are already here
bench.py         times them beside NCCL: python -m kernels.collectives.bench --ranks 2
"""

from kernels.collectives.group import TreeGroup, backend_of, peer_memory, reduce_scatter

__all__ = ["TreeGroup", "backend_of", "peer_memory", "reduce_scatter"]
