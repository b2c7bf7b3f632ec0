"""Finds the bases in which heads are first made equal (aligned, svd), by trying the model's own code."""
