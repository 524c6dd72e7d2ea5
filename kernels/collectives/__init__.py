"""Sums across ranks in tree order.

group.py         TreeGroup: what the rest of the system calls
transport.py     the protocol of what moves bytes under it, and its form over gloo and NCCL
peers.py         another: kernels that write in the other ranks' memory, in a CUDA graph or not; peer_kernels.py those kernels
levels.py        another, over several hosts: inside each first, then between them
fold_kernel.py   the fold of tensors that are already here
rendezvous.py    where ranks find each other, and over which network they talk
heartbeat.py     a sign of life of every rank, and where it is
"""

from kernels.collectives.group import TreeGroup, backend_of, peer_memory
from kernels.collectives.transport import Transport
