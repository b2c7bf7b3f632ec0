"""Runs commands that make a smaller checkpoint of one: load, calibrate, change, measure, save."""
