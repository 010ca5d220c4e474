"""What routing costs in quality: loss of text here, tasks of lm-eval beside it."""
