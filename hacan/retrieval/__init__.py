"""Retrieval: ranks and metrics, coarse-to-fine ranking, banks of features, and the one evaluator of every number."""
