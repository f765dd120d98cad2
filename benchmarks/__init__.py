"""Speed, measured against what a user would do today: ``python -m benchmarks``. Never a test."""
