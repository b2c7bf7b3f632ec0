"""Scripts that run as processes of their own, and import nothing of billhook (see `Worker`)."""
