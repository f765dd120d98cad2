"""The language: nodes, graphs and their builders. Knows no model and imports no transformers."""
