"""Weights at rest and in motion: files, digests, and what travels from the trainer to the engines.

At rest     folder.py    a model directory as both sides read it: shape, contract, tensors, what it says of tokens
            published.py what a published FP8 checkpoint says of its quantization
            beside.py    what stands in it beside its weights; stored.py which tensors it holds; files.py reads and writes them
            tensor_file.py one safetensors file; initial.py random weights; digest.py SHA-256 that both sides agree on
In motion   reshard.py   which rows of which trainer rank go to which shard; bucket.py memory that another process reads
            fingerprint.py a sum over bits that sharding does not change
"""
