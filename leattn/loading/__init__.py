"""Models by name: from a folder, the one that comes along, from a package of the Python package index, or from the Hub."""
