"""Views of a picture under its mask. It may import masks, clip, images and storage."""
