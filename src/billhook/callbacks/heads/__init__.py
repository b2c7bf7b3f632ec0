"""Serves HeadPruning: ranking, masks, the monitored value, and the record of rounds."""
