"""Other people's files of weights: read safely, recognised, renamed, and loaded into a model that computes the same."""
