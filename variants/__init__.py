"""Director's relatives: each file changes one thing of director.py and nothing else."""
