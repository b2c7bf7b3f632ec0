"""Pooling methods for the KV heads of a group."""

from billhook.kv_heads.methods import SVD, Aligned, Auto, KVMethod, Mean

__all__ = ["SVD", "Aligned", "Auto", "KVMethod", "Mean"]
