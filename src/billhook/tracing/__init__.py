"""Dependency tracing: finds coupled parameter dimensions in a run on meta tensors."""
