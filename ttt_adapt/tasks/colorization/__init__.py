"""Colorization: from grey pictures, or film, to colour."""
