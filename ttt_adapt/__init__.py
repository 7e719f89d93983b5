"""Make an existing vision model keep learning from the video it is watching."""
