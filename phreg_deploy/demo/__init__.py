"""The embedded default: a small model and scenes made by this project, and the whole pipeline run on them."""
