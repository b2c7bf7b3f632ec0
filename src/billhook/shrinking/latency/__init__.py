"""A budget of time: what each place costs by the clock, and a model that is fast enough."""
