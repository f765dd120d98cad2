"""Methods to encode prompts, compared on the same examples: ``leattn.compare``."""
