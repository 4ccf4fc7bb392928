"""Stands in for the compiled module behind apex's norms."""
