"""Scripts that run in separate processes without billhook (see `Worker`)."""
