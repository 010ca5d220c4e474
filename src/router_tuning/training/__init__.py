"""Training of routers: the objectives, the budget term, and a `transformers.Trainer` that uses them."""
