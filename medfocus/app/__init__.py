"""A web page for one workstation: images in, what the model says of them, and masks corrected by points."""
