"""A run on many nodes (docs/cluster.md).

node.sh      `ray start` on a node, as head or worker
slurm.sh     `sbatch recipes/cluster/slurm.sh ARGUMENTS`: a whole run as a Slurm job
rayjob.yaml  the same for KubeRay
wait.py      waits until all nodes are there
"""
