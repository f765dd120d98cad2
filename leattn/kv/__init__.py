"""Exact reuse of keys and values: what a node's are named by, where they are kept, how they move to other positions."""
