"""Says what places cost, and which numbers of KV heads and query heads attentions may keep."""
