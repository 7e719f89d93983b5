"""The user's model: looked at, run through hooks, and given back as it was."""
