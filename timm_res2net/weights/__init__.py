"""Reads and renames other projects' weights, loads them into models that compute the same, and exports them."""
