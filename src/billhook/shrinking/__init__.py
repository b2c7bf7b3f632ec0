"""Budgeted search: how many units each module of a model keeps.

How much each layer of a model keeps.
"""
