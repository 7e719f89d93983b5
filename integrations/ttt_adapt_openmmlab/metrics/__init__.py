"""Metrics over data sets, videos and frames."""
