"""What graphs do to real models on real data: one command, one table and one page each, ``python -m studies``."""
