"""One mask per image, without labels."""
