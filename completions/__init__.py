"""Completions of the commands for a shell: `python -m completions` prints them."""
