"""Retrieval: encode a split once, rank coarse to fine, and compute metrics with their provenance."""

from hacan.retrieval.ranking import rank_shortlists as rank_shortlists
