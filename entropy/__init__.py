"""Probability models whose coding decisions are computed from integers alone, and the arithmetic coder (DESIGN 4)."""
