"""Training of routers: objectives, the budget term, and a `transformers.Trainer` that uses them."""
