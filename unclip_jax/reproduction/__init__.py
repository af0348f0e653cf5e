"""The paper's experiments in miniature: each measures one of its claims and says whether it holds."""
