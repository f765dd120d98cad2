"""The model that comes along: small enough for a package, good enough to see what an edge does.

>>> import leattn
>>> model, tokenizer = leattn.tiny.load()
>>> model.config.model_type
'llama'
"""

from leattn.tiny.load import load

__all__ = ["load"]
