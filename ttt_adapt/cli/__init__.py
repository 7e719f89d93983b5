"""The `ttt-adapt` command."""
