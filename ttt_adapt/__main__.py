"""`python -m ttt_adapt`, as `torchrun -m ttt_adapt` needs it."""

from ttt_adapt.cli.app import main

main()
