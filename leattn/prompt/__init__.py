"""From a graph to columns: order, positions, who sees whom, and masks."""
