"""`python -m polytope_hsae` is `hsae`."""

from .cli import main

main()
