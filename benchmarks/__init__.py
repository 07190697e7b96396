"""Measurements of the tool itself; results are committed beside the scripts that make them."""
