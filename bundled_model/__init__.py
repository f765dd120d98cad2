"""Where the weights of `leattn.tiny` come from: its training and its evaluation, ``python -m bundled_model``."""
