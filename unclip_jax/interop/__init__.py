"""Weights of other programs: their files, their names, and their networks as ours."""
