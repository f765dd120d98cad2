"""Every causal language model that transformers knows, as a tiny random model, against oracles that share no code with leattn.

``python -m families`` builds them, checks them and writes what it found, ``--table docs/families.md`` makes a page of it.
"""
