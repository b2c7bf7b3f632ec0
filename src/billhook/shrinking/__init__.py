"""Budgeted search: how many units each module of a model keeps."""
