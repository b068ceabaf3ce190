"""Write the model card of a student or a bundle: ``README.md`` with metadata in the format of the Hugging Face hub."""
