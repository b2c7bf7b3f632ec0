"""Finds, builds, and changes Hugging Face models: tensors, shapes, and configs."""
