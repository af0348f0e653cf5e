"""Stages: each is a handful of pure functions that the one training loop drives."""
