"""Stands in for NVIDIA's apex: its names and signatures, with torch's arithmetic, on any device."""
