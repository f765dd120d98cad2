"""Text from graphs: ``generate`` and what it returns."""
