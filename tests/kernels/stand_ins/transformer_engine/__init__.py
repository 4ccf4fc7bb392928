"""Stands in for TransformerEngine: the names and signatures of its norms, with torch's arithmetic, on any device."""

__version__ = "2.9.0+stand.in"
