"""Evaluation: evaluators and oracles that see images and embeddings, never a stage."""
