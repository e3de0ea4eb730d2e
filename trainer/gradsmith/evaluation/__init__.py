"""How good a model is: exact metrics on held-out text, beside honest baselines."""
