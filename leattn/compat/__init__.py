"""Other projects' names: LE-ATTENTION's functions, and the arguments of the modified LLaMA and of Attend First."""

from leattn.compat.classic import from_atman, from_attend_first
from leattn.compat.le_attention import (
    build_attention_matrix,
    generate_flex_attention_mask_mod,
    prepare_inputs,
    print_dag,
    upstream_nodes,
    visualize_attention_matrix,
)
from leattn.compat.le_nodes import aggregate_attention_matrix, build_adjacency_matrix, is_in, make_and_viz_dag

__all__ = [
    "aggregate_attention_matrix",
    "build_adjacency_matrix",
    "build_attention_matrix",
    "from_atman",
    "from_attend_first",
    "generate_flex_attention_mask_mod",
    "is_in",
    "make_and_viz_dag",
    "prepare_inputs",
    "print_dag",
    "upstream_nodes",
    "visualize_attention_matrix",
]
