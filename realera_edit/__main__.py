"""`python -m realera_edit`."""

from .cli import main

main()
