"""One mask a picture, without labels."""
