"""What the command line does, one module per command; each is a plain function."""
