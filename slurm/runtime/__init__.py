"""What runs inside a SLURM job."""
