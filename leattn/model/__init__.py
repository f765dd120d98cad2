"""What is known of a model, and everything that reaches into transformers."""
