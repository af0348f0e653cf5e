"""Weights of other programs: their files, and which of their tensors is which of our weights."""
