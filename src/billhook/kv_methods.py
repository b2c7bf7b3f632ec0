"""How the KV heads of a group become one."""

from billhook.kv_heads.methods import SVD, Aligned, Auto, Mean

__all__ = ["SVD", "Aligned", "Auto", "Mean"]
