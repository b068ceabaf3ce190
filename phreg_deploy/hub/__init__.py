"""Read models, students and bundles of the Hugging Face hub by names such as ``hf-hub:org/name``."""
