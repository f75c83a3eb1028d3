"""A web page for one workstation: pictures in, what the model says of them, and masks corrected by points."""
