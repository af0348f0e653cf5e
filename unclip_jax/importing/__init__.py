"""Weights of other programs become workdirs of runs; `interop` reads their files and knows their names."""
