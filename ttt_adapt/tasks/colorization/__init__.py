"""Colorization: from grey pictures or films to colour."""
