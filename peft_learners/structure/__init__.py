"""What a model is made of, found from its structure; every function looks through adapters that are there."""
