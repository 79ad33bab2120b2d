"""What tunes a model to its objective: models of its cost and of its traffic, and predictions made from both."""
