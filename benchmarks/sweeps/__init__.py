"""Sweeps over the models of other libraries: which models, how each is built, and what is checked."""
