"""Runs a model without leaving a trace: at rest, batch by batch, block by block, sharded."""
