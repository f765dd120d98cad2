"""How a model comes to follow a graph: blocks, backends (one file each), and the probe that tries them."""
