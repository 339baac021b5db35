"""Runs the model: from (model, text, mask) to a cache of activations. `python -m harvest --help` explains.

It hands on no names: `harvest.model`, `harvest.embedded` and `python -m harvest --help` are each used alone, and one
import here would make all of them wait for torch.
"""
