"""Calibration data: packed examples from text sources and from the model itself."""
