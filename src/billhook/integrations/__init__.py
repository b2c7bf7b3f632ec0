"""billhook in other trainers."""
