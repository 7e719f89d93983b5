"""Scores, protocols and reports: how the arms are compared."""
