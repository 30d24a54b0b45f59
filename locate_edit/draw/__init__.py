"""Figures of what edits did: reports, attacks, comparisons, moved weights, layers."""
