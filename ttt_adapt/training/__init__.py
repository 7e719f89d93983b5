"""Training a model jointly with its branch."""
