"""Tables and figures from JSON results. Reads dicts and files, never a model."""
