"""billhook's own LightningModule, data modules and distillation."""
