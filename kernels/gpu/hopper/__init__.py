"""The toolkit of the Hopper kernels (Gluon, sm_90a): the ring of shared-memory stages (ring.py), blocks in step (pace.py)."""
