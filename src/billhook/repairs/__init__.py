"""Least-squares repair of consumer layers after units are removed."""
