"""What a client sends and gets: the token, uploads, decoded images, encoded answers and refusals."""
