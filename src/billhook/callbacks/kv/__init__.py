"""Serves KVHeadConversion: stages, what examples show, and heads that move before they are pooled."""
